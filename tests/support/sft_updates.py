"""What every rank of tests/parallel/test_sft_layouts.py runs: a supervised step of each case (a family in a layout)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from r1engine.config import SftConfig
from r1engine.model.parallel import join, leave
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.stages import make_stage

warnings.filterwarnings("ignore")
EPS = 1.0  # of Adam, so large that its first step shows the gradient: g / (|g| + EPS)


@dataclass(frozen=True)
class Step:
    """A supervised step of all texts as one batch."""

    metrics: dict[str, float]
    heldout: dict[str, float]  # before the step
    gradient: dict[str, torch.Tensor]  # by Hugging Face's name


def step(model: Path, data: Path, settings: dict) -> Step:
    """Of the model on the conversations of a file."""
    cfg = SftConfig(
        model={"path": model} | settings.get("model", {}),
        run_dir=data.parent / "run",
        data={"train": data, "heldout": data, "template": "chat", "max_tokens": 256},
        sft={"epochs": 1, "batch_size": 64},
        max_row_tokens=settings.get("rows", 512),
        parallel=settings.get("parallel", {}),
        optimizer={"lr": 1.0, "eps": EPS, "clip_grad": 0.0, "schedule": "constant"},
    )
    world = join(cfg.parallel)
    stage = make_stage(cfg, world, Phases(), Progress("", enabled=False))
    heldout = stage.evaluate(0).metrics
    before = {name: tensor.clone() for name, tensor in stage.policy.weights()}
    done = stage.advance(0)
    moved = {name: before[name].double() - tensor.double() for name, tensor in stage.policy.weights()}
    gradient = {name: EPS * step / (1 - step.abs()) for name, step in moved.items()}
    parallel_state.destroy_model_parallel()
    return Step(done.metrics, heldout, gradient)


def steps(cases: dict[str, tuple[Path, Path, dict]]) -> dict[str, Step]:
    """Of each case {name: (folder of the model, file of conversations, settings)}."""
    found = {name: step(*case) for name, case in cases.items()}
    leave()
    return found
