"""Checkpoints and failures of a whole run: how much is lost, and how often to save."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Life:
    """Hours of a whole run, the mean of several replays."""

    hours: float
    lost: float  # of strides that failures undid, and of starting again
    saving: float
    failures: float

    @property
    def overhead(self) -> float:
        """Hours that no stride keeps, over those that strides keep."""
        return (self.lost + self.saving) / (self.hours - self.lost - self.saving)


def live(
    seconds: Sequence[float],
    *,
    every: int,
    checkpoint: float,
    restart: float,
    between_failures: float,
    replays: int = 20,
    seed: int = 0,
) -> Life:
    """Replay a run with failures at random times.

    Args:
        seconds:          of each stride of the run.
        every:            strides between two checkpoints.
        checkpoint:       seconds of one.
        restart:          seconds from a failure to the first stride.
        between_failures: mean seconds between two failures of what the run holds; infinity: none.
        replays:          runs that the mean is of.
        seed:             of the failures.
    """
    generator = random.Random(seed)
    lives = [_replay(seconds, every, checkpoint, restart, between_failures, generator) for _ in range(replays)]
    means = [sum(life[i] for life in lives) / replays for i in range(4)]
    return Life(means[0] / 3600, means[1] / 3600, means[2] / 3600, means[3])


def _replay(
    seconds: Sequence[float], every: int, checkpoint: float, restart: float, mean: float, generator: random.Random
) -> tuple[float, float, float, int]:
    """Seconds in all, lost and of saving, and the number of failures of one replay."""

    def next_failure(now: float) -> float:
        return math.inf if math.isinf(mean) else now + generator.expovariate(1 / mean)

    now, saved_at, done, saved = 0.0, 0.0, 0, 0
    lost = saving = 0.0
    failures, fails_at = 0, next_failure(0.0)
    while saved < len(seconds):
        is_save = done > saved and (done % every == 0 or done == len(seconds))
        takes = checkpoint if is_save else seconds[done]
        if now + takes > fails_at:
            lost += fails_at - saved_at + restart
            failures, now = failures + 1, fails_at + restart
            done, saved_at, fails_at = saved, now, next_failure(now)
            continue
        now += takes
        if is_save:
            saving, saved, saved_at = saving + takes, done, now
        else:
            done += 1
    return now, lost, saving, failures


def daly(checkpoint: float, between_failures: float) -> float:
    """Seconds of work between two checkpoints that lose least: Daly 2006, eq. 37, a correction of Young's sqrt(2CM).

    sqrt(2 C M) (1 + 1/3 sqrt(C / 2M) + C / 18M) - C, and M where C >= 2M
    """
    ratio = checkpoint / (2 * between_failures)
    if ratio >= 1:
        return between_failures
    return math.sqrt(2 * checkpoint * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint
