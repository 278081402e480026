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
        # what stands around the letter
        ("**D**", "D"),
        ("**D. 40**", "D"),
        ("**Answer:** D", "D"),
        ("`D`", "D"),
        ("The best answer is D.", "D"),
        ("I would pick (D)", "D"),
        ("Option D is correct", "D"),
        ("D - forty", "D"),
        ("D\nas 40 is the largest", "D"),
        ("D, because 40 is the largest", "D"),
        ("(D) 40", "D"),
        ("\\textbf{(D) } 40", "D"),
        ("$\\mathbf{D}$", "D"),
        # Chinese: choose D, so choose D, the answer is D, the correct option is D, option D, D as it is the largest
        ("\u9009D", "D"),
        ("\u6545\u9009\uff1aD", "D"),
        ("\u7b54\u6848\u662fD\u3002", "D"),
        ("\u6b63\u786e\u9009\u9879\u662f\uff08D\uff09", "D"),
        ("D\u9009\u9879", "D"),
        ("D\uff0c\u56e0\u4e3a\u6700\u5927", "D"),
        ("\uff24", "D"),
        # several letters
        ("BD", "B, D"),
        ("B, D", "BD"),
        ("D B", "BD"),
        ("(B)(D)", "BD"),
        ("(B) and (D)", "BD"),
        ("Both B and D", "BD"),
        ("B, C, and D", "BCD"),
        ("B\u3001D", "BD"),
        ("B\u548cD", "D; B"),
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
        ("A or B", "B", "the answer is no choice letter"),
        ("(A) or (B)", "B", "the answer is no choice letter"),
        ("not B", "B", "the answer is no choice letter"),
        ("The answer is not B", "B", "the answer is no choice letter"),
        ("B is wrong", "B", "the answer is no choice letter"),
        ("(B) is not right", "B", "the answer is no choice letter"),
        ("All except B", "B", "the answer is no choice letter"),
        ("\u4e0d\u9009B", "B", "the answer is no choice letter"),  # do not choose B
        ("bad", "ABD", "the answer is no choice letter"),  # a word
        ("A, B, C, D", "B", "found A, B, C, D, required B"),
        ("AB", "AC", "found A, B, required A, C"),
        ("B", "AB", "found B, required A, B"),
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
