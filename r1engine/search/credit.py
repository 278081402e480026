"""The scores of steps as a reward in reinforcement learning: one number a completion, or credit of each token.

The paper: a model-based process reward "inevitably leads to reward hacking" (section 4.2). Which form is taken decides
how: a sum pays for steps, so for length; a minimum pays for stopping while all is well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from r1engine.search.vote import Aggregate, aggregate

PER_TOKEN = ("deepseekmath", "pure")
Credit = Aggregate | Literal["deepseekmath", "pure"]  # rewards.process_credit
PURE_TEMPERATURE = 0.1


def of_completion(scores: Sequence[float], how: Credit) -> float:
    """The reward of a completion: last, min, mean, prod or sum of its steps' scores; of credit of tokens the minimum,
    which is only logged.

    Raises:
        ValueError: there is no step.
    """
    return aggregate(scores, "min" if how == "deepseekmath" or how == "pure" else how)


def pure_weights(scores: Sequence[float], temperature: float = PURE_TEMPERATURE) -> list[float]:
    """softmax(-score / temperature): nearly all weight on the lowest score (PURE, arXiv 2504.15275)."""
    lowest = min(scores)
    raw = [math.exp(-(score - lowest) / temperature) for score in scores]
    return [one / math.fsum(raw) for one in raw]


def step_advantages(group: Sequence[Sequence[float]], how: str, ddof: int = 1) -> list[list[float]]:
    """The advantage of each step of the completions of one question: that of all tokens of the step.

        deepseekmath: r~ = (r - mean) / std over all steps of the group; A = sum of r~ from the step on (4.1.3)
        pure:         r~ = weight * r with `pure_weights`; A = sum of r~ from the step on - the group's mean of the sums

    Deviation from PURE, which names another baseline where it adds verifiable rewards: here those have eq. 3's.

    Args:
        group: scores of the steps of each completion; of an empty one nothing is known, and it gets [].
        how:   as above.
        ddof:  of the standard deviation; with fewer steps, or equal scores, all advantages are 0.
    """
    known = [list(scores) for scores in group if scores]
    if how == "pure":
        weighted = [[w * r for w, r in zip(pure_weights(s), s, strict=True)] if s else [] for s in group]
        baseline = fmean(math.fsum(one) for one in weighted if one) if known else 0.0
        return [[value - baseline for value in _sums_from(one)] for one in weighted]
    every = [score for scores in known for score in scores]
    mean = fmean(every) if every else 0.0
    spread = _deviation(every, ddof)
    return [_sums_from([(r - mean) / spread if spread else 0.0 for r in scores]) for scores in group]


def runs_of_tokens(advantages: Sequence[float], ends: Sequence[int], count: int) -> list[tuple[int, float]]:
    """(number of tokens up to here, their advantage) of a completion: each token has that of its step. What is behind
    the last step, such as the token that ends the completion, has the last step's.

    Args:
        advantages: of the steps.
        ends:       number of tokens up to and with each step's last one.
        count:      tokens of the completion.
    """
    return list(zip([*ends[:-1], count], advantages or [0.0], strict=True))


def _sums_from(values: Sequence[float]) -> list[float]:
    total, found = 0.0, []
    for value in reversed(values):
        total += value
        found.append(total)
    return found[::-1]


def _deviation(values: Sequence[float], ddof: int) -> float:
    if len(values) <= ddof or len(set(values)) < 2:
        return 0.0
    return stdev(values) * math.sqrt((len(values) - 1) / (len(values) - ddof))
