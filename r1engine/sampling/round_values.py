"""What a value model says of steps, against what became of them: completions that go through a step tell its worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from r1engine.sampling.search_rows import Row

Prefix = tuple[tuple[int, ...], ...]  # tokens of each step


@dataclass
class Followed:
    """A step of a question's completions."""

    value: float  # what the model says of it
    right: int = 0  # draws through it that ended right
    decided: int = 0  # draws through it whose end is decided

    @property
    def share(self) -> float:
        """Of right ones."""
        return self.right / self.decided


def followed_steps(rows: Iterable[Row]) -> dict[tuple[int, Prefix], Followed]:
    """The steps behind which a decided completion ended, by question and by all tokens up to their ends.

    Equal steps behind equal ones are one, whichever search drew them; equal completions count as often as they were
    drawn. Undecided completions count nowhere, and steps behind which none is decided are left out.
    """
    found: dict[tuple[int, Prefix], Followed] = {}
    for row in rows:
        nodes = {node["node"]: node for node in row["nodes"]}
        for end in row["nodes"]:
            if end.get("verdict") not in ("right", "wrong") or end.get("lookahead"):
                continue
            path = [end]
            while (parent := nodes.get(path[-1]["parent"])) is not None:
                path.append(parent)
            steps = [(tuple(s), v) for one in path[::-1] for s, v in zip(one["tokens"], one["scores"], strict=True)]
            prefix: Prefix = ()
            for step, value in steps:
                prefix = (*prefix, step)
                one = found.setdefault((row["id"], prefix), Followed(value))
                one.decided += end.get("samples", 1)
                one.right += end.get("samples", 1) * (end["verdict"] == "right")
    return found


def area_of_steps(steps: Iterable[Followed]) -> float | None:
    """The probability that a step that leads to right answers has a higher value than one that leads to wrong ones.

    A step is of either kind by its share of right completions. A tie counts one half; None where one kind is missing.
    """
    known = [*steps]
    share = np.array([one.share for one in known])
    _, place = np.unique([one.value for one in known], return_inverse=True)
    right, wrong = np.bincount(place, share), np.bincount(place, 1 - share)  # of each value, the lowest first
    pairs = right.sum() * wrong.sum()
    return float((right * (np.cumsum(wrong) - wrong / 2)).sum() / pairs) if pairs else None


def siblings_told_apart(steps: dict[tuple[int, Prefix], Followed]) -> tuple[float | None, int]:
    """Of two steps behind the same ones, how often that with the larger share of right ends has the higher value.

    Returns:
        the share of such pairs, a tie of values one half, None where there is no pair; and how many there are.
    """
    families: dict[tuple[int, Prefix], list[Followed]] = {}
    for (question, prefix), one in steps.items():
        families.setdefault((question, prefix[:-1]), []).append(one)
    pairs = []
    for family in families.values():
        for a, b in itertools.combinations(family, 2):
            if a.share != b.share:
                better, other = (a, b) if a.share > b.share else (b, a)
                pairs.append(1.0 if better.value > other.value else 0.5 if better.value == other.value else 0.0)
    return (fmean(pairs) if pairs else None), len(pairs)


def error_to_rollouts(samples: Iterable[Followed]) -> float | None:
    """Root mean square of value less probability of a right end, of steps that two or more samples share.

    The share y of m samples differs from the probability p by chance: E (v - y)^2 = (v - p)^2 + p (1 - p) / m. So the
    unbiased estimate of the last term, y (1 - y) / (m - 1), is taken off.

    Args:
        samples: steps of whole completions that were drawn from the question on, not of a search: it would be biased.
    """
    squares = [
        (one.value - one.share) ** 2 - one.share * (1 - one.share) / (one.decided - 1)
        for one in samples
        if one.decided > 1
    ]
    return math.sqrt(max(0.0, fmean(squares))) if squares else None
