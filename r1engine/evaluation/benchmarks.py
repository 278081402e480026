"""The table of benchmarks. A new one is its functions in a file, and a row here. No torch."""

from __future__ import annotations

from r1engine.evaluation.benchmark import Benchmark
from r1engine.evaluation.choice_sets import CHOICE_SETS
from r1engine.evaluation.code_sets import CODE_SETS
from r1engine.evaluation.drop import DROP
from r1engine.evaluation.harnesses import HARNESS_SETS
from r1engine.evaluation.ifeval import IFEVAL
from r1engine.evaluation.math_sets import MATH_SETS
from r1engine.evaluation.own_questions import QUESTIONS
from r1engine.evaluation.short_answers import SHORT_ANSWERS

BENCHMARKS: tuple[Benchmark, ...] = (
    *MATH_SETS,
    *CHOICE_SETS,
    *CODE_SETS,
    DROP,
    IFEVAL,
    *SHORT_ANSWERS,
    *HARNESS_SETS,
    QUESTIONS,
)


def benchmark_of(name: str, where: str) -> Benchmark:
    """The row of this name.

    Raises:
        ValueError: there is none; `where` begins the message.
    """
    for row in BENCHMARKS:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in BENCHMARKS if row is not QUESTIONS)
    raise ValueError(f"{where}: found no such benchmark, required one of {known}, or kind: questions")
