"""What `r1engine simulate` does."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from r1engine.config import ConfigError, RlConfig, check_world
from r1engine.hf.architecture import architecture_of
from r1engine.hf.layout import check_limits
from r1engine.plan.cost import parts_of
from r1engine.plan.hardware import Assumed, Gpu
from r1engine.plan.planner import make_plan
from r1engine.plan.request import assumptions, check_fp8, check_generators, gpu_named, job_of, layout_of
from r1engine.plan.timeline.costs import Guessed, Measured, costs_of_plan, costs_of_run, read_measured, work_of
from r1engine.plan.timeline.lengths import drawn_from, log_normal, read_lengths
from r1engine.plan.timeline.show import Simulation, print_simulation, to_json, write_page
from r1engine.plan.timeline.strides import strides
from r1engine.plan.timeline.whole import Lengths, Span, by_checkpoints, by_generators, by_staleness


@dataclass(frozen=True)
class Replayed:
    """Every second stride of a measured run beside what the others say of them."""

    measured: float  # seconds
    simulated: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.simulated / self.measured - 1


def run_simulation(
    cfg: RlConfig,
    gpus: int,
    gpu_name: str,
    *,
    assume: list[str],
    like: Path | None,
    as_json: bool,
    html: Path | None,
) -> None:
    """Simulate the run, and print what it would take.

    Args:
        cfg:      of the run.
        gpus:     that train.
        gpu_name: what they are.
        assume:   `name=value` changes of what is assumed.
        like:     a run's folder: its costs and lengths; a file: its lengths; None: a plan's costs, log-normal lengths.
        as_json:  print JSON.
        html:     a page to write.

    Raises:
        ConfigError: what `plan` would refuse, a plan that does not fit, or a bad file of lengths.
    """
    assumed, guessed = _assumptions(assume)
    found = read_measured(like) if like is not None and like.is_dir() else None
    lengths = read_lengths(like) if like is not None and like.is_file() else None
    if like is not None and found is None and lengths is None:
        raise ConfigError(f"simulate: {like}: found nothing, required the folder of a run, or a file of lengths")
    if found is not None:
        stretches, each = [_as_measured(cfg, found, guessed)], 1
    else:
        stretches, each = _as_planned(cfg, gpus, gpu_named(gpu_name), assumed, guessed, lengths)
    simulation = _simulated(cfg, stretches, each, guessed)
    check = None if found is None else replayed(found, guessed)
    if html is not None:
        write_page(simulation, html)
    if as_json:
        print(json.dumps(to_json(simulation) | ({"replayed": vars(check)} if check else {}), indent=1))
        return
    console = Console()
    print_simulation(simulation, console)
    if check is not None:
        console.print(
            f"every second stride of {like}: {check.measured:,.1f} s measured, {check.simulated:,.1f} s simulated "
            f"from the costs of the others ({check.error:+.1%})"
        )


def _simulated(cfg: RlConfig, stretches: list[Span], gpus_each: int, guessed: Guessed) -> Simulation:
    """All answers; of generators only where they have GPUs of their own."""
    number = int(guessed.strides)
    every = max(1, round((cfg.checkpoint.every or cfg.steps) / cfg.steps_per_rollout))
    drawn = [stretch.draw(number) for stretch in stretches]
    has_own = stretches[0].costs.has_own_gpus
    return Simulation(
        cfg=cfg,
        stretches=stretches,
        drawn=drawn,
        checkpoints=by_checkpoints(stretches, drawn, every, guessed.gpu_mtbf_hours, int(guessed.seed)),
        staleness=by_staleness(stretches, number) if has_own else [],
        generators=by_generators(stretches, number, gpus_each) if has_own else [],
        guessed=guessed,
    )


def _assumptions(texts: list[str]) -> tuple[Assumed, Guessed]:
    """Both kinds, with their changes."""
    names = vars(Guessed())
    ours = [text for text in texts if text.partition("=")[0] in names]
    changed = {}
    for text in ours:
        name, _, value = text.partition("=")
        try:
            changed[name] = float(value)
        except ValueError:
            raise ConfigError(f"simulate: found --assume {text}, required {name}=NUMBER") from None
        least = {"seed": 0.0, "strides": 1.0}.get(name, 1e-9)
        if not least <= changed[name] < math.inf:
            raise ConfigError(f"simulate: found --assume {text}, required a number from {least:g} on")
    return assumptions([text for text in texts if text not in ours]), Guessed(**changed)


def _as_planned(
    cfg: RlConfig, gpus: int, gpu: Gpu, assumed: Assumed, guessed: Guessed, lengths: list[float] | None
) -> tuple[list[Span], int]:
    """The stretches of a run with the costs of its plan, and the GPUs of one generator."""
    check_fp8(cfg, gpu)
    try:
        check_generators(cfg, gpus, gpu)
        check_world(cfg, gpus)
        arch = architecture_of(cfg.model)
        check_limits(cfg.model.folder, arch, cfg.rollout.limits(cfg.steps), 1, "the shortest prompt")
        if lengths is not None:
            assumed = replace(assumed, mean_tokens=sum(lengths) / len(lengths))
        plan = make_plan(arch, layout_of(cfg, gpus), job_of(cfg, assumed), gpu, assumed)
    except ValueError as error:
        raise ConfigError.of(error) from error
    parts = parts_of(cfg, plan)
    if problems := [problem for part in parts for problem in part.plan.limits()]:
        raise ConfigError(f"simulate: the plan does not fit: {problems[0]}; required one that does (r1engine plan)")
    return [
        Span(
            part.strides, costs_of_plan(part.plan, guessed), work_of(cfg, part.plan.job.prompt_tokens),
            _source(lengths, part.plan.job.mean_tokens, part.plan.job.max_tokens, guessed),
        )
        for part in parts
    ], plan.job.generator_tensor  # fmt: skip


def _source(lengths: list[float] | None, mean: float, limit: int, guessed: Guessed) -> Lengths:
    if lengths is None:
        return lambda: log_normal(mean, guessed.length_sigma, limit, int(guessed.seed))
    cut = [min(length, float(limit)) for length in lengths]
    return lambda: drawn_from(cut, int(guessed.seed))


def _as_measured(cfg: RlConfig, found: Measured, guessed: Guessed) -> Span:
    return Span(
        cfg.steps / cfg.steps_per_rollout, costs_of_run(found, guessed), work_of(cfg, 0.0),
        lambda: drawn_from(found.lengths, int(guessed.seed)),
    )  # fmt: skip


def replayed(found: Measured, guessed: Guessed) -> Replayed:
    """Every second stride of a run, with the costs of the others (so that a busy machine is in both) and, if all are
    known, the strides' own lengths."""
    second = found.rows[1::2]
    costs = costs_of_run(found, guessed, found.rows[::2])
    work = work_of(found.cfg, 0.0)
    known = [length for row in second for length in found.by_step.get(row["step"], ())]
    following = work.questions * work.group_size * work.max_staleness  # what is drawn ahead at the end
    lengths = iter(known + known[: following + 1]) if found.is_complete else drawn_from(found.lengths, 0)
    drawn = islice(strides(costs, work, lengths), len(second))
    return Replayed(sum(row["seconds/total"] for row in second), sum(stride.seconds for stride in drawn))
