"""A judge with three grades: what it means, and what it is asked to catch one that always says yes."""

from __future__ import annotations

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Judged, Reply
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.evaluation.short_answers import CANARIES, three_grades


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("A", "A"),
        ("**B**", "B"),
        (" c. ", "C"),
        ("CORRECT", "A"),  # its first capital letter is a C
        ("INCORRECT", "B"),
        ("NOT_ATTEMPTED", "C"),
        ("Not attempted.", "C"),
        ("A: CORRECT", "A"),
        ("This is a B", "B"),
        ("As a judge, I considered A first. The final grade is B.", "B"),
        ("<think>Is it A?</think>\n\nGrade: **C**", "C"),
        ("\u3010\u6b63\u786e\u3011", "A"),
        ("A fully correct answer would be GRADE: C, but this earns GRADE: Z", None),
        ("As I said", None),
        ("A or B", None),
        ("A: INCORRECT", None),
        ("", None),
        ("<think>A", None),
    ],
)
def test_the_grade_that_a_judge_means(reply, grade):
    assert three_grades(reply) == grade


@pytest.fixture
def asked(tmp_path) -> Judged:
    path = tmp_path / "s.jsonl"
    path.write_text('{"problem": "What is 1 + 1?", "answer": "two"}\n')
    bench = benchmark_of("simpleqa", "")
    (item,) = bench.load(BenchmarkSettings(file=path))
    return bench.grade(item, 0, Reply("It is two.", "stop"))


def test_no_opinion_is_undecided_and_never_not_attempted(asked):
    mark = asked.conclude("I cannot tell.")
    assert (mark.verdict, mark.score, mark.parts) == ("undecided", None, {})
    assert mark.reason == "the judge replied 'I cannot tell.', required A, B or C"


def test_canaries_are_the_same_question_with_answers_that_cannot_be_right(asked):
    assert len(asked.canaries) == len(CANARIES) == 3
    for canary, answer in zip(asked.canaries, CANARIES, strict=True):
        assert canary == asked.prompt.replace("It is two.", answer)
    assert asked.conclude("A").verdict == "right"
