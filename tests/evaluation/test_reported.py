"""Faults that users of other harnesses reported, where ours lie in the rewards or the statistics: the right value here.

Faults of reading are in test_reading.py, of one benchmark in the file of its tests.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from r1engine.evaluation.consensus import consensus
from r1engine.evaluation.ifeval import followed
from r1engine.evaluation.statistics import estimate, pass_at_k
from r1engine.rewards.code import problems
from r1engine.rewards.code.compare import output_problem
from r1engine.rewards.math.accuracy import judge


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("(0,1)", "0,1", "right"),  # a harness that takes commas out makes 01 of it
        ("01", "0,1", "wrong"),
        ("3,5,7", "357", "wrong"),
        ("73", "073", "right"),
        ("33", "033", "right"),
        ("10080", "10,\\!080", "right"),
        ("5/9", "\\frac 59", "right"),
    ],
)
def test_numbers_with_commas_and_zeros(answer, reference, verdict):
    assert judge(answer, reference)[0] == verdict


@pytest.mark.parametrize(
    ("found", "expected", "is_right"),
    [
        ("0.30000000000000004", "0.3", True),
        ("7" * 5000, "7" * 5000, True),
        ("7" * 5000, "8" * 5000, False),
        ("1\n", "1\n2", False),  # not only the lines that both have
        ("NO YES YES", "YES NO YES", False),  # not as a set
    ],
)
def test_what_a_program_prints(found, expected, is_right):
    assert (output_problem(found.encode(), expected) == "") == is_right


def test_tests_that_cannot_be_decoded_are_a_problem_and_no_success():
    record = {"public_test_cases": "[]", "private_test_cases": "not base64!", "metadata": "{}"}
    assert "neither JSON nor compressed" in problems.tests_problem(record)


def test_samples_are_not_questions():
    with pytest.raises(ValueError, match="found k = 10, required 1 to the 1 samples"):
        pass_at_k(1, 1, 10)
    assert pass_at_k(64, 28, 1) == 0.4375


def test_a_perfect_score_is_not_certain_and_a_tie_is_half():
    assert estimate([1.0] * 30).low == pytest.approx(0.886487, abs=1e-6)
    assert consensus(["1", "1", "2", "2"], [True, True, False, False]) == 0.5


def test_the_language_of_a_short_reply_is_one_in_every_process():
    code = (
        "from r1engine.evaluation.ifeval import followed\n"
        "print(followed([('language:response_language', {'language': 'en'})], 'Hello world')[0][0])"
    )
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert said == {f"{followed([('language:response_language', {'language': 'en'})], 'Hello world')[0][0]}\n"}
