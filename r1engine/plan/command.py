"""What `r1engine plan` does."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from r1engine.config import ConfigError, Parallel, RlConfig, check_world
from r1engine.hf.architecture import Architecture, architecture_of
from r1engine.hf.layout import check_limits, check_trained
from r1engine.plan.cost import describe_parts, parts_of, total
from r1engine.plan.hardware import Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import Job
from r1engine.plan.page import write_html
from r1engine.plan.planner import Plan, make_plan
from r1engine.plan.request import (
    Planned,
    assumptions,
    check_fp8,
    check_generators,
    check_positions,
    gpu_named,
    job_of,
    layout_of,
    trained_part,
)
from r1engine.plan.search import least_gpus, search
from r1engine.plan.settings import alternatives, settings
from r1engine.plan.show import generators, print_plan, print_settings, ranking_table, to_json
from r1engine.plan.sizes import rank_parameters


def run_plan(
    cfg: Planned,
    gpus: int,
    gpu_name: str,
    *,
    auto: bool,
    assume: list[str],
    as_json: bool,
    html: Path | None,
) -> bool:
    """Plan the run, print the plan, and say whether it fits.

    Raises:
        ConfigError: what `train` would refuse of the model and the layout, or an unknown GPU or assumption.
    """
    gpu, assumed = gpu_named(gpu_name), assumptions(assume)
    check_fp8(cfg, gpu)
    if cfg.model.path is None:
        raise ConfigError("plan: model.path: found null, required a folder with config.json")
    try:
        plan, ranking = _planned(cfg, gpus, gpu, assumed, auto=auto)
    except ValueError as error:
        raise ConfigError.of(error) from error
    _check_against_model(plan.arch, cfg, plan)
    if html is not None:
        write_html(plan, ranking, cfg.model.path.name, html)
    parts = parts_of(cfg, plan)
    fits = all(part.plan.fits for part in parts)
    spent = total([part.hours for part in parts], gpu, assumed)
    others = alternatives(plan) if auto and fits else []
    if as_json:
        print(json.dumps(_as_json(plan, ranking, others) | {"run": vars(spent)}, indent=1))
        return fits
    console = Console()
    if auto:
        console.print(ranking_table(ranking))
    print_plan(plan, console)
    console.print(f"the whole run, {describe_parts(cfg, parts)}: {spent.describe()}")
    for problem in dict.fromkeys(problem for part in parts[1:] for problem in part.plan.limits()):
        console.print(f"[red]does not fit later[/]: {problem}")
    if auto:
        print_settings(plan, others, console)
    if not fits:
        _print_least(plan.arch, plan.job, gpu, assumed, console, optimizer_offload=cfg.optimizer.offload)
    return fits


def _planned(cfg: Planned, gpus: int, gpu: Gpu, assumed: Assumed, *, auto: bool) -> tuple[Plan, list[Plan]]:
    """The plan, and what a search has ranked; what `train` would refuse is refused.

    Raises:
        ValueError: see `run_plan`.
    """
    found = architecture_of(cfg.model)
    arch = trained_part(found, cfg)
    if isinstance(cfg, RlConfig):
        check_limits(cfg.model.folder, arch, cfg.rollout.limits(cfg.steps), 1, "the shortest prompt")
    else:
        check_positions(cfg, arch)
    job = job_of(cfg, assumed)
    check_generators(cfg, gpus, gpu)
    ranking = search(arch, job, gpus, gpu, assumed, optimizer_offload=cfg.optimizer.offload) if auto else []
    if auto and not ranking:
        raise ConfigError(f"plan: no layout of {gpus} GPUs divides the model and the batch")
    plan = ranking[0] if auto else make_plan(arch, layout_of(cfg, gpus), job, gpu, assumed)
    check_trained(cfg.model.folder, found, cfg.model, _parallel(cfg, plan.layout), arch.head)
    if not auto:
        check_world(cfg, gpus)
    return plan, ranking


def _as_json(plan: Plan, ranking: list[Plan], others: list[tuple[str, Plan]]) -> dict[str, object]:
    """With what `--auto` has found, if it was asked."""
    if not ranking:
        return to_json(plan)
    return to_json(plan) | {
        "settings": settings(plan),
        "ranking": [to_json(p) for p in ranking],
        "alternatives": {name: to_json(other) | {"settings": settings(other)} for name, other in others},
    }


def _check_against_model(arch: Architecture, cfg: Planned, plan: Plan) -> None:
    """Build the true Megatron model of every stage and hold the closed forms to it."""
    from r1engine.model.stage_sizes import stage_parameters

    built = stage_parameters(arch, cfg.model, _parallel(cfg, plan.layout), plan.layout.gpus)
    for stage, names in enumerate(built):
        expected = sum(rank_parameters(arch, plan.layout, stage, with_mtp=plan.job.with_mtp).values())
        assert sum(names.values()) == expected, f"stage {stage}: Megatron builds {sum(names.values())}, not {expected}"


def _parallel(cfg: Planned, layout: Layout) -> Parallel:
    return cfg.parallel.model_copy(
        update={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual": layout.virtual,
            "context": layout.context,
            "expert": layout.expert,
            "expert_tensor": layout.expert_tensor,
            "first_stage_layers": layout.first_stage,
            "last_stage_layers": layout.last_stage,
        }
    )


def _print_least(
    arch: Architecture, job: Job, gpu: Gpu, assumed: Assumed, console: Console, *, optimizer_offload: bool = False
) -> None:
    least = least_gpus(arch, job, gpu, assumed, optimizer_offload=optimizer_offload)
    if least is None:
        console.print("no number of GPUs up to 8192 fits")
        return
    console.print(
        f"the least number of {gpu.name.upper()}s that fits is {least.layout.gpus}: {least.layout.describe()}, "
        f"recompute {least.layout.recompute}{generators(least)}"
    )
