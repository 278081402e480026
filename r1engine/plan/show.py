"""A plan as tables in a terminal, as one HTML page, and as JSON."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from r1engine.plan.memory import PHASE_TERMS, StageMemory
from r1engine.plan.planner import Plan, describe_model, knobs
from r1engine.plan.settings import settings


def to_json(plan: Plan) -> dict:
    """Every number of a plan: GiB of the worst stage's rank, seconds of one rollout and its updates."""
    layout, job = plan.layout, plan.job
    return {
        **describe_model(plan.arch),
        "gpu": plan.gpu.name,
        "ranks": layout.gpus,
        "layout": _layout_json(plan),
        "generator_gpus": job.generator_tensor,
        "generators": job.generators,
        "slots": job.slots,
        "gpus_in_all": plan.gpus,
        "row_tokens": job.row_tokens,
        "memory_gib": {phase: getattr(plan.worst, terms) for phase, terms in PHASE_TERMS.items()},
        "memory_gib_by_stage": [
            {phase: sum(getattr(stage, terms).values()) for phase, terms in PHASE_TERMS.items()}
            for stage in plan.stages
        ],
        "parameters_by_stage": [sum(stage.parameters.values()) for stage in plan.stages],
        "gpu_memory_gib": plan.gpu.memory_gib,
        "host_memory_gib": plan.host_gib,
        "phase_seconds": {phase.name: phase.total for phase in plan.phases},
        "phase_seconds_by_cause": {phase.name: phase.seconds for phase in plan.phases},
        "traffic_gb_per_gpu": {phase.name: phase.traffic_gb for phase in plan.phases},
        "seconds": plan.seconds,
        "optimizer_steps": job.minibatches * job.inner_epochs,
        "tokens": job.tokens,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "mfu_update": plan.mfu,
        "assumed": vars(plan.assumed),
        "fits": plan.fits,
        "limits": plan.limits(),
    }


def _layout_json(plan: Plan) -> dict[str, object]:
    layout = plan.layout
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
        "context": layout.context,
        "data": layout.data,
        "expert_data": layout.expert_data,
        "stage_layers": [len(layers) for layers in layout.stage_layers(plan.arch.num_layers)],
        "recompute": layout.recompute,
        "distributed_optimizer": layout.distributed_optimizer,
        "optimizer_offload": layout.optimizer_offload,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """The whole plan: model, memory, time, what breaks first and what frees it."""
    model, job = describe_model(plan.arch), plan.job
    console.print(
        f"[bold]{model['parameters_total'] / 1e9:.2f} B parameters[/], "
        f"{model['parameters_active'] / 1e9:.2f} B active for a token; "
        f"{plan.layout.gpus} x {plan.gpu.name.upper()}, {plan.layout.describe()}{generators(plan)}"
    )
    of = f"of {job.mean_tokens:,.0f} tokens on average, {job.max_tokens:,} at most, in rows of {job.row_tokens:,}"
    if job.generates:
        console.print(
            f"one rollout: {job.completions:,} completions {of}; {job.minibatches * job.inner_epochs} updates"
        )
    else:
        console.print(f"one step: {job.completions:,} texts {of}")
    console.print(memory_table(plan))
    console.print(time_table(plan))
    assumed = ", ".join(f"{name} {value:g}" for name, value in vars(plan.assumed).items())
    console.print(f"[dim]assumed: {assumed}[/]")
    _print_verdict(plan, console)


def generators(plan: Plan) -> str:
    """What a line about a layout goes on with."""
    job = plan.job
    if not job.generates:
        return ""
    if job.slots is not None:
        return f", the embedded generator with {job.slots} slots"
    where = "" if job.generators is None else f" on {job.generator_gpus} more"
    return f", generators of {job.generator_tensor} GPUs{where}"


def _generator(plan: Plan) -> str:
    """A cell of the ranking."""
    job = plan.job
    if not job.generates:
        return "-"
    return f"{job.generator_tensor} GPUs" if job.slots is None else f"{job.slots} slots"


def unit_of(plan: Plan) -> str:
    """What the seconds of a plan are of."""
    return "one rollout and its updates" if plan.job.generates else "one step"


def ranking_table(plans: list[Plan]) -> Table:
    """The layouts of a search, one a line, the best first."""
    table = Table(title="Layouts", title_justify="left")
    for name in ("layout", "recompute", "row", "generators", "peak GiB", "in", "s", "tok/s/GPU", "fits"):
        table.add_column(name, justify="left" if name in ("layout", "recompute", "in") else "right")
    for plan in plans:
        phase, gib = plan.peak
        table.add_row(
            plan.layout.describe(),
            plan.layout.recompute,
            f"{plan.job.row_tokens:,}",
            _generator(plan),
            f"{gib:.1f}",
            phase,
            f"{plan.seconds:,.0f}",
            f"{plan.tokens_per_second_per_gpu:.1f}",
            "yes" if plan.fits else "no",
        )
    return table


def print_settings(plan: Plan, others: list[tuple[str, Plan]], console: Console) -> None:
    """What to put behind the configuration, and what other numerics would give."""
    console.print(f"settings: {' '.join(settings(plan))}", highlight=False)
    for name, other in others:
        gain = other.seconds / plan.seconds - 1
        console.print(
            f"  with {name}: {other.seconds:,.1f} s ({gain:+.0%}), peak {other.peak[1]:.1f} GiB, "
            f"{other.layout.describe()}, rows of {other.job.row_tokens:,}"
        )


def memory_table(plan: Plan) -> Table:
    """What the fullest GPU holds in each phase."""
    worst: StageMemory = plan.worst
    table = Table(title=f"GiB on the fullest GPU (pipeline stage {worst.stage})", title_justify="left")
    table.add_column("")
    names: list[str] = []
    phases = {phase: terms for phase, terms in PHASE_TERMS.items() if getattr(worst, terms)}
    for phase, terms in phases.items():
        table.add_column(phase, justify="right")
        names += [name for name in getattr(worst, terms) if name not in names]
    for name in names:
        values = [getattr(worst, terms).get(name) for terms in phases.values()]
        if any(value is not None and value >= 0.005 for value in values):
            table.add_row(name, *("" if value is None else f"{value:.2f}" for value in values))
    table.add_section()
    sums = [sum(getattr(worst, terms).values()) for terms in phases.values()]
    limit = plan.gpu.memory_gib
    table.add_row(f"sum (of {limit} GiB)", *(f"[{'red' if x > limit else 'green'}]{x:.1f}[/]" for x in sums))
    return table


def time_table(plan: Plan) -> Table:
    """What each phase takes, and by what."""
    table = Table(title=f"Seconds of {unit_of(plan)}", title_justify="left")
    table.add_column("phase")
    table.add_column("s", justify="right")
    table.add_column("of which")
    table.add_column("GB moved a GPU")
    for phase in plan.phases:
        causes = sorted(phase.seconds.items(), key=lambda item: -item[1])
        traffic = ", ".join(f"{kind} {amount:,.1f}" for kind, amount in phase.traffic_gb.items())
        table.add_row(
            phase.name,
            f"{phase.total:,.1f}",
            ", ".join(f"{name} {seconds:,.1f}" for name, seconds in causes if seconds >= 0.05),
            traffic,
        )
    table.add_section()
    rate = f"{plan.tokens_per_second_per_gpu:.1f} tokens/s a GPU"
    table.add_row("sum", f"{plan.seconds:,.1f}", rate, f"MFU of the update {plan.mfu:.1%}")
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    host = ", ".join(f"{name} {gib:,.0f}" for name, gib in plan.host_gib.items()) or "nothing of the run's"
    console.print(f"host memory of a node, GiB: {host} (of {plan.gpu.host_memory_gib:,.0f})")
    if plan.fits:
        phase, gib = plan.peak
        console.print(f"[green]fits[/]: {gib:.1f} of {plan.gpu.memory_gib} GiB, the most in {phase}")
        return
    for limit in plan.limits():
        console.print(f"[red]does not fit[/]: {limit}")
    for name, changed in knobs(plan)[:4]:
        outcome = "then it fits" if changed.fits else f"then {changed.limits()[0]}"
        console.print(f"  {name}: peak {changed.peak[1]:.1f} GiB, {changed.seconds:,.0f} s; {outcome}")
