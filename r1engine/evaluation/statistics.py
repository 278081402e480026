"""How sure an evaluation is: intervals over questions, pass@k, paired comparisons. Pure Python.

A score of a question is the mean of its samples, each in [0, 1]; the score of a benchmark is the mean over questions.
Samples of one question are no independent evidence, so errors are taken over questions (or clusters of them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over questions."""

    mean: float
    standard_error: float
    low: float  # of the interval
    high: float


@dataclass(frozen=True)
class Difference:
    """Of the same questions under two models."""

    mean: float
    standard_error: float
    low: float
    high: float
    t: float
    p: float  # two-sided


def estimate(scores: Sequence[float], *, clusters: Sequence[object] | None = None) -> Estimate:
    """Mean score with its error over questions and a 95 % interval.

    The error is CR1: sqrt(G / (G - 1) * sum over clusters of (sum of its deviations)^2) / n, which is that of a mean
    where each question is a cluster of its own. The interval is Student's with G - 1 degrees of freedom, cut to [0, 1].
    Where all scores are 0 or all are 1, or each is 0 or 1, it is Wilson's: never of width 0.

    Args:
        scores:   of each question, in [0, 1].
        clusters: what each question belongs to, as questions of one text do; None: every question is its own.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("estimate: found no scores, required at least one")
    n, mean = len(scores), fmean(scores)
    sums: dict[object, float] = {}
    for number, score in enumerate(scores):
        key = number if clusters is None else clusters[number]
        sums[key] = sums.get(key, 0.0) + score - mean
    groups = len(sums)
    squares = math.fsum(total * total for total in sums.values())
    error = math.sqrt(groups / (groups - 1) * squares) / n if groups > 1 else math.nan
    if groups == 1 or all(score in (0.0, 1.0) for score in scores):
        return Estimate(mean, error, *wilson(mean, n))
    half = t_quantile((1 + CONFIDENCE) / 2, groups - 1) * error
    return Estimate(mean, error, max(0.0, mean - half), min(1.0, mean + half))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` independent trials."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def error_with(samples: float, scores: Sequence[float], *, drawn: int) -> float:
    """Standard error that `samples` samples of each question would give (math.inf: as many as one likes).

        Var = (V + W / samples) / n,   W = mean of k / (k - 1) * s_i * (1 - s_i),   V = max(0, var(s_i) - W / k)

    Args:
        samples: of each question.
        scores:  of each question, each the mean of 0s and 1s.
        drawn:   k, samples behind each score; at least 2.
    """
    n, mean = len(scores), fmean(scores)
    within = fmean(drawn / (drawn - 1) * score * (1 - score) for score in scores)
    between = max(0.0, math.fsum((score - mean) ** 2 for score in scores) / (n - 1) - within / drawn)
    return math.sqrt((between + within / samples) / n)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k samples is right, without bias: 1 - C(n - c, k) / C(n, k) (Chen et al., 2021).

    Raises:
        ValueError: k is more than the samples that there are.
    """
    if not 0 < k <= samples:
        raise ValueError(f"pass_at_k: found k = {k}, required 1 to the {samples} samples of the question")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def compare(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Paired difference of the scores of the same questions, first minus second, with Student's t.

    Raises:
        ValueError: the two have not equally many questions, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"compare: found {len(first)} and {len(second)} questions, required the same, at least two")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n, mean = len(differences), fmean(differences)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n * (n - 1)))
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    return Difference(mean, error, mean - half, mean + half, t, 2 * (1 - t_cdf(abs(t), n - 1)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: questions that only one of two models got right."""
    n, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(least + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted by Holm's step-down method, in their order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def t_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t."""
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return 1.0 - tail if t > 0 else tail


def t_quantile(share: float, degrees: int) -> float:
    """Where Student's t reaches a share in [0.5, 1), by bisection to 1e-10."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < share:
        high *= 2
    while high - low > 1e-10 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function by its continued fraction (DLMF 8.17.22)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # there the fraction of the mirrored arguments converges faster
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    fraction = 0.0
    for m in range(200, 0, -1):  # from the inside out
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = even / (1 + odd / (1 + fraction))
    return front / (1 - (a + b) * x / (a + 1) / (1 + fraction))
