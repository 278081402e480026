"""What the parts of a run cost: from its plan, or from a run that was measured."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from r1engine.config import ConfigError, RlConfig, load
from r1engine.observe.starts import read_starts
from r1engine.plan.memory import WEIGHT
from r1engine.plan.phases import decode_step, generator_slots
from r1engine.plan.planner import Plan
from r1engine.plan.sizes import forward_work, total_parameters
from r1engine.plan.timeline.lengths import read_lengths
from r1engine.plan.timeline.strides import Costs, Demand, strides

TRAINED = ("score", "logprobs", "update")  # phases of a run's rows that grow with the tokens
STATE = WEIGHT + 12  # bytes a parameter in a checkpoint: bf16, fp32 master weight and two moments


@dataclass(frozen=True)
class Guessed:
    """What neither a plan nor a data sheet knows. Printed with every simulation; change it with `--assume`."""

    length_sigma: float = 0.8  # of the logarithm of the lengths of completions
    gpu_mtbf_hours: float = 50_000.0  # of a GPU and its part of the node: Llama 3, 3.3.4: 419 in 54 days of 16,384
    restart_seconds: float = 900.0  # until a failure is seen, and the run goes on
    checkpoint_gb_s: float = 10.0  # of the file system, all ranks together
    strides: float = 6.0  # that are drawn; a run repeats them
    seed: float = 0.0


def work_of(cfg: RlConfig, prompt_tokens: float) -> Demand:
    """What a stride of a run takes."""
    return Demand(
        questions=cfg.grpo.questions,
        group_size=cfg.grpo.group_size,
        prompt_tokens=prompt_tokens,
        max_staleness=cfg.rollout.max_staleness,
        oversample=cfg.rollout.oversample,
    )


def costs_of_plan(plan: Plan, guessed: Guessed) -> Costs:
    """The parts of a plan's seconds, as a function of what is drawn."""
    arch, job, gpu, assumed = plan.arch, plan.job, plan.gpu, plan.assumed
    seconds = {phase.name: phase.total for phase in plan.phases}
    context = job.prompt_tokens + job.mean_tokens / 2
    rate = job.generator_tensor * gpu.bf16_tflops * 1e12 * assumed.dense_efficiency
    prefill = job.prompt_tokens * forward_work(arch).total(job.prompt_tokens / 2) / rate / job.group_size

    @cache
    def step(samples: int) -> float:
        return decode_step(arch, samples, context, job, gpu, assumed)

    return Costs(
        step=step,
        prefill=prefill,
        train_token=(seconds["logprobs"] + seconds["update"]) / job.tokens,
        train=seconds["optimizer"],
        refresh=seconds["refresh"] + seconds["switch"],
        checkpoint=STATE * total_parameters(arch, with_mtp=job.with_mtp) / 1e9 / guessed.checkpoint_gb_s,
        restart=guessed.restart_seconds,
        generators=job.generators or max(1, plan.layout.gpus // job.generator_tensor),
        slots=max(1, generator_slots(arch, job, gpu, assumed)),
        has_own_gpus=job.generators is not None,
        gpus=plan.gpus,
    )


# ---------------------------------------------------------------------- of a run that was measured


@dataclass(frozen=True)
class Measured:
    """What a run's folder says."""

    cfg: RlConfig
    ranks: int
    rows: list[dict[str, Any]]  # of its strides
    lengths: list[float]
    by_step: dict[int, list[float]]  # lengths of the completions that a stride's samples show
    summary: dict[str, Any]

    @property
    def is_complete(self) -> bool:
        """Whether every completion of every stride is among the samples."""
        per_stride = self.cfg.grpo.questions * self.cfg.grpo.group_size
        return all(len(self.by_step.get(row["step"], ())) == per_stride for row in self.rows)


def read_measured(run_dir: Path) -> Measured:
    """Read the folder of a run of reinforcement learning that drew in its own process.

    Raises:
        ConfigError: it is none, or it has logged too little.
    """
    needed = [run_dir / name for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "provenance.json")]
    if missing := [path.name for path in needed if not path.is_file()]:
        raise ConfigError(f"simulate: {run_dir}: found no {', '.join(missing)}, required the folder of a run")
    cfg = load(needed[0], [], RlConfig)
    if cfg.rollout.engine != "local":
        raise ConfigError(f"simulate: {run_dir}: found rollout.engine {cfg.rollout.engine}, required local")
    lengths, by_step = read_lengths(needed[2]), defaultdict[int, list[float]](list)
    try:
        rows = [row for row in map(json.loads, needed[1].read_text().splitlines()) if "seconds/generate" in row]
        for sample in map(json.loads, needed[2].read_text().splitlines()):
            if not sample.get("heldout"):
                by_step[sample["step"]].append(float(sample["length"]))
        summary = json.loads(text.read_text()) if (text := run_dir / "summary.json").is_file() else {}
        ranks = read_starts(run_dir)[-1]["ranks"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"simulate: {run_dir}: found a file that no run writes ({error!r})") from error
    if len(rows) < 4:
        raise ConfigError(f"simulate: {run_dir}: found {len(rows)} strides, required 4")
    return Measured(cfg, ranks, rows, lengths, dict(by_step), summary)


def costs_of_run(found: Measured, guessed: Guessed, rows: list[dict[str, Any]] | None = None) -> Costs:
    """The median cost of each part in some rows of a run; None: in all. A median, as a grader may have hung once."""
    rows = found.rows if rows is None else rows
    trained = [sum(row.get(f"seconds/{phase}", 0.0) for phase in TRAINED) for row in rows]
    known = [
        row["seconds/generate"] + row["seconds/refresh"] + seconds for row, seconds in zip(rows, trained, strict=True)
    ]
    saves = found.summary.get("checkpoints", 0)
    base, each = _step_of(found, rows)
    return Costs(
        step=lambda samples: base + each * samples,
        train_token=median(seconds / row["tokens_generated"] for row, seconds in zip(rows, trained, strict=True)),
        train=max(0.0, median(row["seconds/total"] - seconds for row, seconds in zip(rows, known, strict=True))),
        refresh=median(row["seconds/refresh"] for row in rows),
        checkpoint=found.summary["checkpoint_seconds"] / saves if saves else 0.0,
        restart=guessed.restart_seconds,
        generators=found.ranks,
        slots=found.cfg.rollout.slots,
        has_own_gpus=False,
        gpus=found.ranks,
    )


def _step_of(found: Measured, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a decoding step, and more for each sample in it, of on-policy strides: least squares of the seconds on
    steps and tokens; where not all lengths are known, all of it is of the step."""
    seconds = [row["seconds/generate"] for row in rows]
    if not found.is_complete or found.cfg.rollout.max_staleness:
        generator, count = random.Random(0), found.cfg.grpo.questions * found.cfg.grpo.group_size
        return sum(seconds) / sum(_steps(found, generator.choices(found.lengths, k=count)) for _ in rows), 0.0
    steps = [_steps(found, found.by_step[row["step"]]) for row in rows]
    tokens = [row["tokens_generated"] / found.ranks for row in rows]
    ss, st, tt = _sumprod(steps, steps), _sumprod(steps, tokens), _sumprod(tokens, tokens)
    sy, ty = _sumprod(steps, seconds), _sumprod(tokens, seconds)
    determinant = ss * tt - st * st
    base, each = ((sy * tt - ty * st) / determinant, (ty * ss - sy * st) / determinant) if determinant else (-1.0, 0.0)
    if base < 0 or each < 0 or not math.isfinite(base + each):
        return median(taken / number for taken, number in zip(seconds, steps, strict=True)), 0.0
    return base, each


def _sumprod(left: list[float], right: list[float]) -> float:
    """Sum of the products."""
    return sum(x * y for x, y in zip(left, right, strict=True))


def _steps(found: Measured, lengths: list[float]) -> float:
    """Decoding steps of a stride whose completions have these lengths."""
    costs = Costs(
        step=lambda samples: 1.0, train_token=0.0, refresh=0.0, checkpoint=0.0, restart=0.0,
        generators=found.ranks, slots=found.cfg.rollout.slots, has_own_gpus=False, gpus=found.ranks,
    )  # fmt: skip
    once = Demand(questions=found.cfg.grpo.questions, group_size=found.cfg.grpo.group_size, prompt_tokens=0.0)
    return next(strides(costs, once, iter(lengths))).generate
