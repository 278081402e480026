"""The answer that is read out of a reply: what peers' harnesses got wrong, each with the right reading."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from r1engine.evaluation.choice_order import shown_order
from r1engine.evaluation.reading import answer_line, letter, math_answer, summary, the_answer_is

LETTERS = [
    # the last reading counts, not the first
    ("Antwort:\n\nAntwort: C", 4, "C"),
    ("Answer seems to be A.\n\nAnswer: A", 4, "A"),
    ("Answer: A. No, wait. Answer: B", 4, "B"),
    ("I considered (A). Final answer: D.", 4, "D"),
    ("The answer is A, because B is wrong.", 4, "A"),
    ("The answer is B. Note that A is a distractor.", 10, "B"),
    # words that are letters
    ("The answer is C because I computed it", 10, "C"),
    ("The answer is I think C", 10, None),
    ("The answer is I.", 10, "I"),
    ("I think B", 4, None),
    ("I would pick B \u2014 a safe choice.", 4, "B"),
    ("The answer is a safe choice", 4, None),
    ("The correct answer is d.", 4, "D"),
    ("Answer: As said above", 4, None),
    # nothing is guessed
    ("Answer seems to be A.", 26, None),
    ("The answer is unclear.", 26, None),
    ("Actually this one is tricky", 4, None),
    ("Error: rate limited", 4, None),
    ("The answer is not B", 4, None),
    ("Answer: A or B", 4, None),
    ("Answer: A, B", 4, None),
    ("The answer is E", 4, None),
    ("", 4, None),
    # how models write it
    ("ANSWER IS D", 4, "D"),
    ("answer: (D)", 4, "D"),
    ("Answer: **D**", 4, "D"),
    ("**Answer:** B", 4, "B"),
    ("**The answer is (J)**", 10, "J"),
    ("Answer: $\\boxed{A}$", 4, "A"),
    ("Answer: $\\text{D}$", 4, "D"),
    ("Answer: \\(B\\)", 4, "B"),
    ("Answer: B) Paris", 4, "B"),
    ("answer is option B", 4, "B"),
    ("So \\boxed{\\text{C}}.", 4, "C"),
    ('```json\n{"reasoning": "as A is wrong", "answer": "C"}\n```', 4, "C"),
    ("It is clear.\n\n(C)", 4, "C"),
    ("\u7b54\u6848\uff1aB", 4, "B"),
    ("\u6240\u4ee5\u7b54\u6848\u662fC\u3002", 4, "C"),
    ("\u6545\u9009D", 4, "D"),
    # thoughts are no answer
    ("<think>Answer: A</think>Answer: B", 4, "B"),
    ("<think>Answer: A", 4, None),
    ("<think>Answer: A</think>", 4, None),
]


@pytest.mark.parametrize(("reply", "options", "wanted"), LETTERS)
def test_the_letter_that_a_reply_chooses(reply, options, wanted):
    found, why_none = letter(reply, options)
    assert found == wanted
    assert bool(why_none) == (wanted is None)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("<think>let $a=1$, so $b$</think> The sum is \\boxed{7}, where $c=2$.", "7"),
        ("</think> </think> \\boxed{7}", "7"),
        ("Answer: 18", "18"),
        ("**Answer:** 18", "18"),
        ("Therefore 18\n#### 18", "18"),
        ("The final answer is $18$. I hope it is correct.", "18"),
        ("\\fbox{18}", "18"),
        ("\\boxed 7", "7"),
        ("Answer: 3\n\\boxed{4}", "4"),
        ("Answer: 3\n\\boxed{4", None),
        ("<think>\\boxed{4}", None),
        ("It is eighteen.", None),
    ],
)
def test_the_answer_to_a_problem_of_mathematics(reply, wanted):
    assert math_answer(reply)[0] == wanted


def test_a_line_ends_an_answer_and_a_period_does_not():
    assert answer_line("Answer: 12.25")[0] == "12.25"
    assert answer_line("Answer: 10\n\nPassage: The 2011 census")[0] == "10"
    assert answer_line("10\n\nPassage: The 2011 census")[0] is None
    assert the_answer_is("Therefore, the answer is Lake Como.")[0] == "Lake Como."
    assert summary("<think>\nx\n</think>\n\n Paris ")[0] == "Paris"
    assert summary("<think> x </think> ") == (None, "the reply is blank")


def test_each_option_stands_at_each_place_equally_often():
    assert shown_order("q", 4, 0) == shown_order("q", 4, 4)
    for question in map(str, range(50)):
        places = Counter(shown_order(question, 4, sample).index(0) for sample in range(8))
        assert set(places.values()) == {2} and len(places) == 4


def test_the_right_options_of_198_questions_are_spread():
    first = Counter(shown_order(f"rec{number}", 4, 0).index(0) for number in range(198))
    assert all(0.15 < first[place] / 198 < 0.35 for place in range(4)), first


def test_the_order_is_the_same_in_another_process():
    code = "from r1engine.evaluation.choice_order import shown_order as f; print([f('q', 4, s) for s in range(4)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [shown_order("q", 4, sample) for sample in range(4)]
