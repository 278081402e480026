"""Which of many answers is the answer: majority, weighted majority, best; and what the scores of steps become."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from r1engine.evaluation.consensus import equal_answers

Aggregate = Literal["last", "min", "mean", "prod", "sum"]
Choice = Literal["vote", "best", "majority"]


class Candidate(NamedTuple):
    """An answer with what speaks for it."""

    answer: str | None  # None: none could be read
    value: float  # of its path
    weight: float = 1.0  # how often it counts


def aggregate(scores: Sequence[float], how: Aggregate) -> float:
    """The scores of a path's steps as one value.

    Raises:
        ValueError: there is no score.
    """
    if not scores:
        raise ValueError("found no score of a step, required at least one")
    if how == "last":
        return scores[-1]
    if how == "min":
        return min(scores)
    if how == "prod":
        return math.prod(scores)
    return math.fsum(scores) / (1 if how == "sum" else len(scores))


def choose(
    candidates: Sequence[Candidate], how: Choice, is_same: Callable[[str, str], bool] = str.__eq__
) -> int | None:
    """Number of the candidate whose answer wins; None where no candidate has an answer.

    - `majority`: the weights are the votes.
    - `vote`: values times weights are; Math-Shepherd's weighted self-consistency.
    - `best`: the candidate of the highest value wins.
    - Equal answers vote together. A candidate without an answer never wins.
    - A tie goes to the class with the highest value, then to the earlier sample.
    - The winner of a class is its candidate of the highest value, then the earliest.
    """
    known = [i for i, one in enumerate(candidates) if one.answer is not None]
    if not known:
        return None
    if how == "best":
        return max(known, key=lambda i: (candidates[i].value, -i))
    votes = Counter(candidates[i].answer or "" for i in known)
    number_of = {text: n for n, one in enumerate(equal_answers(votes, is_same)) for text in one}
    members: dict[int, list[int]] = {}
    for i in known:
        members.setdefault(number_of[candidates[i].answer or ""], []).append(i)

    def strength(group: list[int]) -> tuple[float, float, int]:
        cast = [candidates[i].weight * (1.0 if how == "majority" else candidates[i].value) for i in group]
        return math.fsum(cast), max(candidates[i].value for i in group), -group[0]

    winners = max(members.values(), key=strength)
    return max(winners, key=lambda i: (candidates[i].value, -i))
