"""A plan of a whole pipeline: the time of each of its stages, before there is any weight or any data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from r1engine.config import (
    ConfigError,
    CurateConfig,
    EvaluateConfig,
    Model,
    PairsConfig,
    ProcessRewardConfig,
    RewardModelConfig,
    RlConfig,
    SampleConfig,
    SftConfig,
    check_world,
)
from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.hf.architecture import architecture_of
from r1engine.plan.cost import Stretch, parts_of, total
from r1engine.plan.hardware import Assumed, Gpu
from r1engine.plan.planner import Plan, make_plan
from r1engine.plan.request import (
    Planned,
    Supervised,
    assumptions,
    check_fp8,
    check_generators,
    epochs_of,
    gpu_named,
    job_of,
    layout_of,
    trained_part,
)

SOME = 1_000  # questions, texts or pairs, where nobody knows yet how many there are
Run = TypeVar("Run", RlConfig, SftConfig, RewardModelConfig, ProcessRewardConfig)
# v2, B.4.4: thousands of H800 hours. R1-Zero took 198 hours of 512 H800, R1 about 80.
PAPER = {"R1-Zero": 101, "data for supervised training": 5, "R1": 41}


@dataclass(frozen=True)
class StageCost:
    """What one stage is expected to take."""

    name: str
    kind: str
    work: str = ""  # what the hours are of
    held: list[tuple[float, int]] = field(default_factory=list)  # hours, and the GPUs that are held for them
    is_whole: bool = True  # False: the hours are of `SOME` questions, texts or pairs
    plans: list[Plan] = field(default_factory=list)
    note: str = ""  # why it is not planned

    @property
    def hours(self) -> float | None:
        """None: it is not planned."""
        return sum(hours for hours, _ in self.held) if self.held else None

    @property
    def gpu_hours(self) -> float | None:
        """None: it is not planned."""
        return sum(hours * gpus for hours, gpus in self.held) if self.held else None

    @property
    def fits(self) -> bool:
        """Whether nothing is known that would stop it."""
        return all(plan.fits for plan in self.plans)


@dataclass(frozen=True)
class Cluster:
    """What the stages run on, and what is assumed of it."""

    gpus: int
    gpu: Gpu
    assumed: Assumed


def plan_pipeline(
    pipeline: Pipeline,
    gpus: int,
    gpu_name: str,
    *,
    assume: list[str],
    as_json: bool,
    console: Console | None = None,
) -> bool:
    """Plan every stage, print them, and say whether all fit.

    Raises:
        ConfigError: an unknown GPU or assumption, or a layout that cannot run.
    """
    cluster = Cluster(gpus, gpu_named(gpu_name), assumptions(assume))
    costs = [cost_of(stage, pipeline, cluster) for stage in pipeline.stages]
    if as_json:
        print(json.dumps([_as_json(cost) for cost in costs], indent=1))
    else:
        _print(costs, cluster, console or Console())
    return all(cost.fits for cost in costs)


def cost_of(stage: PlannedStage, pipeline: Pipeline, cluster: Cluster) -> StageCost:
    """What one stage is expected to take.

    Raises:
        ConfigError: the layout of the stage cannot run on so many GPUs.
    """
    cfg, cost = stage.cfg, StageCost(stage.name, stage.cfg.stage)
    try:
        if isinstance(cfg, RlConfig):
            return _of_rl(cost, _rooted(cfg, stage, pipeline), cluster)
        if isinstance(cfg, SftConfig):
            return _of_epochs(cost, _rooted(cfg, stage, pipeline), stage, pipeline, cluster)
        if isinstance(cfg, RewardModelConfig):
            return _of_epochs(cost, _rooted(cfg, stage, pipeline), stage, pipeline, cluster)
        if isinstance(cfg, ProcessRewardConfig):
            return _of_epochs(cost, _rooted(cfg, stage, pipeline), stage, pipeline, cluster)
        if isinstance(cfg, SampleConfig):
            run = cfg.as_run().model_copy(update={"model": Model(path=_root(stage, "model.path", pipeline))})
            return _of_drawing(cost, [run], cfg.samples, cluster)
        if isinstance(cfg, EvaluateConfig):
            roots = [_root(stage, f"models.{i}.path", pipeline) for i in range(len(cfg.models))]
            runs = [cfg.as_run(i).model_copy(update={"model": Model(path=root)}) for i, root in enumerate(roots)]
            return _of_drawing(cost, runs, cfg.samples, cluster)
    except ValueError as error:
        raise ConfigError([f"stage {stage.name}: {problem}" for problem in ConfigError.of(error).problems]) from error
    if isinstance(cfg, CurateConfig):
        return replace(cost, note="CPUs, and a server that rewrites" if cfg.refine else "CPUs")
    if isinstance(cfg, PairsConfig):
        return replace(cost, note="a server that judges")
    return replace(cost, note=f"no plan of stage {cfg.stage}")


def _root(stage: PlannedStage, key: str, pipeline: Pipeline) -> Path | None:
    """The folder that the model of a stage has its shape from: the one that the first stage of its line reads."""
    names = {other.name: other for other in pipeline.stages}
    while (before := stage.needs.get(key)) is not None and "model.path" in names[before].cfg.inputs():
        stage, key = names[before], "model.path"
    return stage.cfg.inputs().get(key)


def _rooted(cfg: Run, stage: PlannedStage, pipeline: Pipeline) -> Run:
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": _root(stage, "model.path", pipeline)})})


def _rows(stage: PlannedStage, pipeline: Pipeline, paper: int) -> int | None:
    """Texts, pairs or labels that a stage trains on: those of the mixture, or the paper's; None: a stage is to say."""
    made_by = stage.needs.get("data.train")
    source = next((other.cfg for other in pipeline.stages if other.name == made_by), None)
    if source is None:
        return paper
    return sum(source.counts.values()) if isinstance(source, CurateConfig) and source.counts else None


def _of_rl(cost: StageCost, cfg: RlConfig, cluster: Cluster) -> StageCost:
    """Rollouts and updates, for each limit of the completions that the run reaches."""
    check_world(cfg, cluster.gpus)
    return _of_parts(cost, f"{cfg.steps:,} steps", parts_of(cfg, _plan(cfg, cluster)))


def _of_epochs(
    cost: StageCost, cfg: Supervised, stage: PlannedStage, pipeline: Pipeline, cluster: Cluster
) -> StageCost:
    check_world(cfg, cluster.gpus)
    epochs, _, paper, name = epochs_of(cfg)
    rows = _rows(stage, pipeline, paper)
    count = SOME if rows is None else rows
    parts = parts_of(cfg, _plan(cfg, cluster), count)
    return replace(_of_parts(cost, f"{epochs} x {count:,} {name}", parts), is_whole=rows is not None)


def _of_parts(cost: StageCost, work: str, parts: list[Stretch]) -> StageCost:
    return replace(cost, work=work, held=[part.hours for part in parts], plans=[part.plan for part in parts])


def _of_drawing(cost: StageCost, runs: list[RlConfig], samples: int, cluster: Cluster) -> StageCost:
    """Generation alone, of `SOME` questions: how many there are is in a file that nobody has read."""
    held = []
    for run in runs:
        arch = architecture_of(run.model)
        job = replace(job_of(run, cluster.assumed), questions=SOME, group_size=samples)
        plan = Plan(arch, layout_of(run, cluster.gpus), job, cluster.gpu, cluster.assumed)
        seconds = next(phase.total for phase in plan.phases if phase.name == "generate")
        held.append((seconds / 3600, job.generator_gpus or cluster.gpus))
    models = f"{len(runs)} models x " if len(runs) > 1 else ""
    work = f"{models}{SOME:,} questions x {samples}"
    return replace(cost, work=work, held=held, is_whole=False)


def _plan(cfg: Planned, cluster: Cluster) -> Plan:
    check_fp8(cfg, cluster.gpu)
    check_generators(cfg, cluster.gpus, cluster.gpu)
    arch, job = trained_part(architecture_of(cfg.model), cfg), job_of(cfg, cluster.assumed)
    return make_plan(arch, layout_of(cfg, cluster.gpus), job, cluster.gpu, cluster.assumed)


def _as_json(cost: StageCost) -> dict[str, object]:
    return {
        "stage": cost.name,
        "kind": cost.kind,
        "work": cost.work,
        "hours": cost.hours,
        "gpu_hours": cost.gpu_hours,
        "is_whole": cost.is_whole,
        "peak_gib": max((plan.peak[1] for plan in cost.plans), default=None),
        "fits": cost.fits,
        "note": cost.note,
    }


def _print(costs: list[StageCost], cluster: Cluster, console: Console) -> None:
    table = Table(box=None)
    for column in ("stage", "kind", "layout", "peak GiB", "hours of", "hours", "GPU hours"):
        table.add_column(column, justify="right" if column in ("peak GiB", "hours", "GPU hours") else "left")
    for cost in costs:
        layout = cost.plans[0].layout.describe() if cost.plans else cost.note
        peak = f"{max(plan.peak[1] for plan in cost.plans):.1f}" if cost.plans else ""
        hours = "" if cost.hours is None else f"{cost.hours:,.1f}"
        gpu_hours = "" if cost.gpu_hours is None else f"{cost.gpu_hours:,.0f}"
        table.add_row(cost.name, cost.kind, layout, peak, cost.work, hours, gpu_hours)
    console.print(table)
    whole = [cost for cost in costs if cost.held and cost.is_whole]
    spent = total([held for cost in whole for held in cost.held], cluster.gpu, cluster.assumed)
    console.print(
        f"{cluster.gpus} x {cluster.gpu.name.upper()}, and generators' own: {spent.describe()} for "
        f"{', '.join(cost.name for cost in whole)}"
    )
    if rest := [cost.name for cost in costs if cost not in whole]:
        console.print(f"not in this sum, as nobody has counted their work: {', '.join(rest)}")
    paper = ", ".join(f"{name} {thousands}K" for name, thousands in PAPER.items())
    console.print(f"the paper (v2, B.4.4), in H800 hours: {paper}; together {sum(PAPER.values())}K")
    for cost in costs:
        for problem in dict.fromkeys(problem for plan in cost.plans for problem in plan.limits()):
            console.print(f"stage {cost.name} does not fit: {problem}")
    assumed = ", ".join(f"{name} {value:g}" for name, value in vars(cluster.assumed).items())
    console.print(f"[dim]assumed: {assumed}[/]")
