"""Codeforces rating of a model from the ranks that it would have had in contests (paper, Table 2)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

HIGHEST = 5000.0  # where the search for a rating ends
PRECISION = 0.01


@dataclass(frozen=True)
class ContestRow:
    """One participant of a contest."""

    rating: float  # before it
    points: float
    penalty: float = 0.0


def expected_rank(rating: float, others: Sequence[float]) -> float:
    """Rank that Elo expects of a rating among others: 1 + sum of 1 / (1 + 10^((rating - r) / 400))."""
    return 1.0 + math.fsum(1.0 / (1.0 + 10 ** ((rating - other) / 400)) for other in others)


def rank_of(points: float, penalty: float, rows: Sequence[ContestRow]) -> float:
    """Rank of a result: 1 + those ahead (more points, or as many and less penalty); equal results share the mean."""
    ahead = sum(row.points > points or (row.points == points and row.penalty < penalty) for row in rows)
    equal = sum(row.points == points and row.penalty == penalty for row in rows)
    return 1.0 + ahead + equal / 2


def rating_of_rank(rank: float, others: Sequence[float]) -> float:
    """Rating of which Elo expects this rank, by bisection to 0.01.

    Nobody is expected to come first for sure: rank 1 is the best rating of the contest and 400. The last rank is 0.
    """
    if rank <= 1:
        return max(others) + 400
    low, high = 0.0, HIGHEST
    if expected_rank(low, others) <= rank:
        return low
    while high - low > PRECISION / 2:
        middle = (low + high) / 2
        low, high = (middle, high) if expected_rank(middle, others) > rank else (low, middle)
    return (low + high) / 2


def percentile(rating: float, sorted_ratings: Sequence[float]) -> float:
    """Share of participants (ratings in rising order) that a rating is above."""
    return bisect.bisect_left(sorted_ratings, rating) / len(sorted_ratings)
