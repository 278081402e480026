"""Multiple choice and exact text."""

from __future__ import annotations

import pytest

from r1engine.rewards.choice import judge_choice, judge_exact


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B.", "B"),
        ("B) because it is the largest", "B"),
        ("B: Paris", "B"),
        ("Option B", "B"),
        ("answer: B", "B"),
        ("The answer is B", "B"),
        ("\\text{B}", "B"),
        ("\\textbf{(B)}", "B"),
        ("$B$", "(B)"),
        ("A, C", "A,C"),
        ("C and A", "A, C"),
        ("A,C,D", "D; C; A"),
    ],
)
def test_right_choice(answer, reference):
    assert judge_choice(answer, reference) == ("right", "same choice")


@pytest.mark.parametrize(
    ("answer", "reference", "reason"),
    [
        ("C", "B", "found C, required B"),
        ("A, B", "B", "found A, B, required B"),
        ("A", "A, C", "found A, required A, C"),
        ("A dog", "A", "the answer is no choice letter"),  # an article
        ("Because", "B", "the answer is no choice letter"),
        ("5", "B", "the answer is no choice letter"),
        ("A or B or C or D?", "B", "the answer is no choice letter"),
    ],
)
def test_wrong_choice(answer, reference, reason):
    assert judge_choice(answer, reference) == ("wrong", reason)


def test_reference_without_a_letter_is_undecided():
    assert judge_choice("B", "42") == ("undecided", "the reference is no choice letter")


def test_exact_text_may_differ_in_white_space_and_delimiters_only():
    assert judge_exact(" a\n b ", "a b")[0] == "right"
    assert judge_exact("$a b$", "\\text{a b}")[0] == "right"
    for answer in ("A b", "ab", "a b.", "a b c", ""):
        assert judge_exact(answer, "a b") == ("wrong", "another text")
