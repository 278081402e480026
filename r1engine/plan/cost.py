"""What a whole run takes: hours, GPU hours, their price and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1engine.config import RlConfig
from r1engine.plan.hardware import Assumed, Gpu
from r1engine.plan.planner import Plan
from r1engine.plan.request import Planned, epochs_of, job_of


@dataclass(frozen=True)
class Stretch:
    """A part of a run in which completions have one limit."""

    strides: float  # rollouts with their updates, or steps
    plan: Plan  # of one of them

    @property
    def hours(self) -> tuple[float, int]:
        """Of all of them, and the GPUs that they hold."""
        return self.strides * self.plan.seconds / 3600, self.plan.gpus


def parts_of(cfg: Planned, plan: Plan, rows: int | None = None) -> list[Stretch]:
    """The parts of a whole run, in order, in the layout of `plan`.

    Args:
        cfg:  of the run.
        plan: of its first stride.
        rows: texts, pairs or labels of supervised training; None: the paper's number.
    """
    if not isinstance(cfg, RlConfig):
        epochs, size, paper, _ = epochs_of(cfg)
        return [Stretch(epochs * (paper if rows is None else rows) / size, plan)]
    starts = sorted(cfg.rollout.limits(cfg.steps))
    parts = []
    for start, end in zip(starts, [*starts[1:], cfg.steps], strict=True):
        at = job_of(cfg, plan.assumed, start)
        job = replace(plan.job, mean_tokens=at.mean_tokens, max_tokens=at.max_tokens)
        parts.append(Stretch((end - start) / cfg.steps_per_rollout, replace(plan, job=job)))
    return parts


def describe_parts(cfg: Planned, parts: Sequence[Stretch]) -> str:
    """How much work the parts are."""
    if isinstance(cfg, RlConfig):
        return f"{cfg.steps:,} updates after {sum(part.strides for part in parts):,.0f} rollouts"
    epochs, _, rows, name = epochs_of(cfg)
    return f"{epochs} epoch{'s' if epochs > 1 else ''} of the paper's {rows:,} {name}"


@dataclass(frozen=True)
class Cost:
    """Of a run or a pipeline, without evaluations, checkpoints and failures."""

    hours: float
    gpu_hours: float  # of trainer and generators
    megawatt_hours: float  # at most: the boards at their limit, without hosts and cooling
    price: float | None  # None: no rate is given

    def describe(self) -> str:
        """In one line."""
        text = (
            f"{self.hours:,.1f} h, {self.gpu_hours:,.0f} GPU hours, at most {self.megawatt_hours:,.2f} MWh of the GPUs"
        )
        return text if self.price is None else f"{text}, price {self.price:,.0f}"


def total(hours: Sequence[tuple[float, int]], gpu: Gpu, assumed: Assumed) -> Cost:
    """The sum of (hours, GPUs that are held for them)."""
    gpu_hours = sum(count * gpus for count, gpus in hours)
    price = gpu_hours * assumed.gpu_hour_price if assumed.gpu_hour_price else None
    return Cost(sum(count for count, _ in hours), gpu_hours, gpu_hours * gpu.watts / 1e6, price)
