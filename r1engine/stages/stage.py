"""What a way of training offers to run.py, which owns time: ranks, resume, checkpoints, logs, reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from r1engine.model.policy import Policy
    from r1engine.stages.identity import Identity


@dataclass(frozen=True)
class Advance:
    """The result of a stride."""

    steps: int  # optimizer steps that it made
    metrics: dict[str, float]
    tokens: int  # that it processed; the log divides them by its seconds
    flops: float = 0.0  # that all ranks could not do without; 0: not counted
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows of samples.jsonl
    undecided: list[dict[str, Any]] = field(default_factory=list)  # rows of undecided.jsonl
    notes: list[str] = field(default_factory=list)  # lines for the user


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # rows of samples.jsonl
    note: str  # one line for the user


class Stage(Protocol):
    """One way of training. All calls are collective."""

    policy: Policy
    steps: int  # optimizer steps of the whole stage

    def identity(self) -> Identity:
        """What must not change between a checkpoint and the run that goes on from it."""

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Get ready to advance with the present weights, fresh or loaded; `rows` is what was logged so far."""

    def advance(self, step: int) -> Advance:
        """One stride, after `step` optimizer steps."""

    def evaluate(self, step: int) -> Evaluated | None:
        """Look at the held-out data; None where there is none."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write into the folder of a checkpoint; returns the rest of the state as JSON values."""

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read back what `save` wrote and returned."""

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The run in a few numbers, for summary.json, from all logged rows."""

    def close(self) -> None:
        """End what the stage has started."""
