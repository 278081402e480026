"""Several evaluations side by side: paired differences over the questions that both have. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from r1engine.config import ConfigError
from r1engine.evaluation.afterwards import scores_in, stored_summary
from r1engine.evaluation.results import Summary
from r1engine.evaluation.statistics import Difference, compare, holm, mcnemar


@dataclass(frozen=True)
class Paired:
    """A benchmark in two evaluations: the second minus the first."""

    benchmark: str
    questions: int  # that both have
    difference: Difference
    p: float  # of Student's t, or of McNemar's exact test where all scores are 0 or 1
    adjusted: float  # by Holm, over the benchmarks of this comparison
    needed: int | None  # questions like these that would show such a difference in four of five trials; None: it is 0


def paired(first: Path, second: Path) -> list[Paired]:
    """The differences of two evaluations in the benchmarks that both have.

    Raises:
        ConfigError: they were graded by different numbers of a grader.
    """
    mine, other = stored_summary(first)["benchmarks"], stored_summary(second)["benchmarks"]
    found: list[tuple[str, int, Difference, float]] = []
    for name in [name for name in mine if name in other]:
        _same_grader(name, first, mine[name], second, other[name])
        before, after = scores_in(first, name), scores_in(second, name)
        both = [question for question in before if question in after]
        if len(both) < 2:
            continue
        a, b = [after[question] for question in both], [before[question] for question in both]
        difference = compare(a, b)
        p = difference.p
        if all(score in (0.0, 1.0) for score in (*a, *b)):
            p = mcnemar(sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True)))
        found.append((name, len(both), difference, p))
    adjusted = holm([p for *_, p in found])
    return [
        Paired(name, questions, difference, p, after, needed(difference, questions))
        for (name, questions, difference, p), after in zip(found, adjusted, strict=True)
    ]


def needed(difference: Difference, questions: int) -> int | None:
    """Questions that would show the difference at 5 % with power 80 %: n * ((1.96 + 0.84) * SE / difference)^2."""
    if not difference.mean:
        return None
    return math.ceil(questions * (2.801585 * difference.standard_error / difference.mean) ** 2)


def _same_grader(name: str, first: Path, mine: Summary, second: Path, other: Summary) -> None:
    if mine["grader"] != other["grader"]:
        old = first if mine["grader"] < other["grader"] else second
        raise ConfigError(
            f"{name}: graded by {mine['grader']} in {first} and by {other['grader']} in {second}, required the same: "
            f"r1engine evaluate grade {old}"
        )
