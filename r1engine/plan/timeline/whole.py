"""A whole run on paper: its strides, and what another staleness, other generators and checkpoints would make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from r1engine.config import ConfigError
from r1engine.plan.timeline.failures import Life, daly, live
from r1engine.plan.timeline.strides import Costs, Demand, Stride, strides

WARM_UP = 2  # strides that fill what is drawn ahead
LONGEST = 2.0  # times between failures, that may lie between two checkpoints
MANY = 1_000  # strides of a replay with failures, at most; the shares are those of the whole run
Lengths = Callable[[], Iterator[float]]  # anew from the beginning: what is compared draws the same


@dataclass(frozen=True)
class Span:
    """A part of the run in which completions have one limit."""

    count: float  # strides
    costs: Costs
    work: Demand
    lengths: Lengths

    def draw(self, number: int) -> list[Stride]:
        """So many strides from the middle of it."""
        return list(islice(strides(self.costs, self.work, self.lengths()), WARM_UP, WARM_UP + number))


def mean_seconds(drawn: list[Stride]) -> float:
    """Of a stride."""
    return sum(stride.seconds for stride in drawn) / len(drawn)


def hours_of(stretches: list[Span], drawn: list[list[Stride]]) -> float:
    """Of all strides of a run, from those that were drawn of each stretch; without checkpoints and failures."""
    return sum(s.count * mean_seconds(found) for s, found in zip(stretches, drawn, strict=True)) / 3600


@dataclass(frozen=True)
class Choice:
    """One answer to a question, and what it costs."""

    name: str
    seconds: float  # of a stride of the first stretch
    busy: float  # share of the generators' slots that draw, there
    hours: float  # of the run
    gpus: int
    is_configured: bool


def by_staleness(stretches: list[Span], number: int) -> list[Choice]:
    """On-policy, a step ahead, and two with half as many questions again on their way."""
    asked = [("on-policy", 0, 1.0), ("one step ahead", 1, 1.0), ("two, 1.5 times the questions", 2, 1.5)]
    work = stretches[0].work
    now = (work.max_staleness, work.oversample)
    if now not in [(staleness, oversample) for _, staleness, oversample in asked]:
        asked.append((f"{now[0]} ahead, {now[1]:g} times the questions", *now))
    return [
        _choice(
            name,
            [replace(s, work=replace(s.work, max_staleness=staleness, oversample=oversample)) for s in stretches],
            number,
            is_configured=(staleness, oversample) == now,
        )
        for name, staleness, oversample in asked
    ]


def by_generators(stretches: list[Span], number: int, gpus_each: int) -> list[Choice]:
    """More and fewer generators on GPUs of their own."""
    costs = stretches[0].costs
    counts = sorted({max(1, round(costs.generators * share)) for share in (0.25, 0.5, 1, 2, 4)})
    found = []
    for count in counts:
        gpus = costs.gpus + (count - costs.generators) * gpus_each
        others = [replace(s, costs=replace(s.costs, generators=count, gpus=gpus)) for s in stretches]
        is_configured = count == costs.generators
        found.append(_choice(f"{count} of {gpus_each} GPUs", others, number, is_configured=is_configured))
    return found


def _choice(name: str, stretches: list[Span], number: int, *, is_configured: bool) -> Choice:
    drawn = [stretch.draw(number) for stretch in stretches]
    busy = sum(stride.busy for stride in drawn[0]) / number
    gpus = stretches[0].costs.gpus
    return Choice(name, mean_seconds(drawn[0]), busy, hours_of(stretches, drawn), gpus, is_configured)


@dataclass(frozen=True)
class Interval:
    """Checkpoints every so many strides, and what a run loses with them."""

    every: int
    life: Life


@dataclass(frozen=True)
class Checkpoints:
    """How often to save."""

    configured: int  # strides
    between_failures: float  # seconds
    daly_strides: float
    found: list[Interval]  # by strides
    replayed: float  # share of the run that was replayed

    @property
    def best(self) -> Interval:
        """That which loses least; of near equals the rarest."""
        least = min(saving.life.overhead for saving in self.found)
        return max((s for s in self.found if s.life.overhead <= 1.02 * least + 1e-9), key=lambda s: s.every)

    @property
    def now(self) -> Interval:
        """As configured."""
        return next(saving for saving in self.found if saving.every == self.configured)


def by_checkpoints(
    stretches: list[Span], drawn: list[list[Stride]], configured: int, gpu_mtbf_hours: float, seed: int
) -> Checkpoints:
    """Replay the run with failures, saving every 1, 2, 4 ... strides.

    Raises:
        ConfigError: as configured, the run hardly ever gets from one checkpoint to the next.
    """
    costs, seconds = stretches[0].costs, []
    for stretch, found in zip(stretches, drawn, strict=True):
        seconds += [found[i % len(found)].seconds for i in range(max(1, round(stretch.count)))]
    whole = len(seconds)
    seconds = seconds[:: math.ceil(whole / MANY)]
    mean = sum(seconds) / len(seconds)
    between = gpu_mtbf_hours * 3600 / costs.gpus
    longest = int(LONGEST * between / mean)  # strides: of more, hardly ever all are done before a failure
    if configured > longest:
        raise ConfigError(
            f"simulate: checkpoint.every: found {configured} strides of {mean / 3600:,.2f} h, but a failure comes "
            f"every {between / 3600:,.1f} h; required at most {longest} strides"
        )
    everys = sorted({*(2**i for i in range(10) if 2**i <= min(longest, max(1, len(seconds) // 2))), configured})
    savings = [
        Interval(
            every,
            live(
                seconds, every=every, checkpoint=costs.checkpoint, restart=costs.restart, between_failures=between,
                seed=seed,
            ),
        )
        for every in everys
    ]  # fmt: skip
    best = daly(costs.checkpoint, between) / mean
    return Checkpoints(configured, between, best, savings, len(seconds) / whole)
