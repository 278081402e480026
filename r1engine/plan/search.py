"""`r1engine plan --auto`: every layout that divides, with the fastest row and generators; what fits comes first, the
fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from r1engine.hf.architecture import Architecture
from r1engine.plan.hardware import GIB, Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import Job, generating_gib
from r1engine.plan.phases import generator_slots, phases
from r1engine.plan.planner import Plan, layout_problem, make_plan
from r1engine.plan.sizes import total_parameters

MOST_GPUS = 8192  # where the search for the least number stops
ROWS = (1, 2, 4, 8)  # max_row_tokens that are tried, in those of the configuration


def layouts(arch: Architecture, gpus: int, gpu: Gpu, *, optimizer_offload: bool = False) -> Iterator[Layout]:
    """Layouts of `gpus` GPUs: tensor parallelism within a node, pipelines even or with short ends."""
    tensors = [t for t in (1, 2, 4, 8) if t <= min(gpu.per_node, gpus)]
    pipelines = [p for p in (1, 2, 4, 8, 16, 32) if p <= min(gpus, arch.num_layers)]
    most_experts = arch.moe.num_experts if arch.moe else 1
    contexts = [c for c in (1, 2, 4, 8) if c <= gpus]
    experts = [e for e in (1, 2, 4, 8, 16, 32, 64, 128, 256) if e <= min(gpus, most_experts)]
    for tensor, pipeline, context, expert in product(tensors, pipelines, contexts, experts):
        ends = _ends(arch.num_layers, pipeline)
        if ends is None:
            continue
        for recompute in ("none", "full"):
            layout = Layout(
                gpus=gpus,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                expert=expert,
                first_stage=ends[0],
                last_stage=ends[1],
                recompute=recompute,
                optimizer_offload=optimizer_offload,
            )
            if layout.problem(arch) is None:
                yield layout


def _ends(layers: int, pipeline: int) -> tuple[int | None, int | None] | None:
    """Layers of the first and last stage so that the rest is even and the ends, which embed and predict, are short."""
    if layers % pipeline == 0:
        return None, None
    if pipeline < 3:
        return (layers // 2 + layers % 2, None) if pipeline == 2 else None
    middle = -(-layers // pipeline)
    rest = layers - middle * (pipeline - 2)
    if rest < 2:
        return None
    return rest - rest // 2, rest // 2


def generator_jobs(job: Job, gpus: int, gpu: Gpu) -> list[Job]:
    """The job with other generators: more or fewer slots of the embedded one, servers of other sizes on the trainer's
    GPUs (which are one node) or on the same number of their own."""
    sizes = (1, 2, 4, 8, 16, 32, 64)
    if job.slots is not None:
        most = job.completions / gpus
        return [replace(job, slots=slots) for slots in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if slots <= most]
    if job.generators is None:
        return [replace(job, generator_tensor=size) for size in sizes if size <= gpus and gpus % size == 0]
    own = job.generator_gpus
    return [replace(job, generator_tensor=size, generators=own // size) for size in sizes if own % size == 0]


def search(
    arch: Architecture,
    job: Job,
    gpus: int,
    gpu: Gpu,
    assumed: Assumed,
    *,
    optimizer_offload: bool = False,
    keep: int = 8,
) -> list[Plan]:
    """The fastest plans that fit, of layouts with the optimizer where it is said to be, each with the row that makes it
    fastest; without any, those nearest to fitting."""
    if job.generates:
        job = _best_generator(arch, job, gpus, gpu, assumed)
    found = layouts(arch, gpus, gpu, optimizer_offload=optimizer_offload)
    possible = [layout for layout in found if layout_problem(arch, layout, job) is None]
    plans = [make_plan(arch, layout, job, gpu, assumed) for layout in possible]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        roomy = [plan for plan in fitting if _is_roomy(plan)]
        return sorted(map(_with_best_row, roomy or fitting), key=lambda plan: plan.seconds)[:keep]
    return sorted(plans, key=lambda plan: (len(plan.limits()), plan.peak[1]))[:keep]


def _with_best_row(plan: Plan) -> Plan:
    """The plan with the longest of `ROWS` that still fits and that a rank can fill, if that is faster."""
    job, best = plan.job, plan
    for times in ROWS[1:]:
        row_tokens = times * job.row_tokens
        if row_tokens > job.tokens / job.minibatches / plan.layout.data:
            break
        longer = replace(plan, job=replace(job, row_tokens=row_tokens))
        if not (longer.fits and _is_roomy(longer)):
            break
        best = min(best, longer, key=lambda found: found.seconds)
    return best


def _is_roomy(plan: Plan) -> bool:
    """Whether a GPU is not filled to the brim: the planned bytes are not exact, and allocators leave gaps."""
    return plan.peak[1] <= plan.assumed.fill_share * plan.gpu.memory_gib


def _best_generator(arch: Architecture, job: Job, gpus: int, gpu: Gpu, assumed: Assumed) -> Job:
    """With the generators that are fastest of those that hold the model; the trainer's layout does not matter."""
    layout = Layout(gpus=gpus)
    jobs = generator_jobs(job, gpus, gpu) or [job]
    able = [
        other
        for other in jobs
        if generator_slots(arch, other, gpu, assumed) >= 1
        and (other.slots is None or generating_gib(arch, other, gpu, assumed) <= assumed.fill_share * gpu.memory_gib)
    ]
    if not able:  # nearest to holding it
        return jobs[0] if job.slots is not None else jobs[-1]
    return min(able, key=lambda other: phases(arch, layout, other, gpu, assumed)[0].total)


def least_gpus(
    arch: Architecture, job: Job, gpu: Gpu, assumed: Assumed, *, optimizer_offload: bool = False
) -> Plan | None:
    """The plan on the least number of GPUs (a power of two) that fits; None up to MOST_GPUS."""
    gpus = 1
    while gpus * gpu.memory_gib * GIB < 6 * total_parameters(arch):  # bf16 weights and fp32 gradients alone
        gpus *= 2
    while gpus <= MOST_GPUS:
        best = search(arch, job, gpus, gpu, assumed, optimizer_offload=optimizer_offload, keep=1)
        if best and best[0].fits:
            return best[0]
        gpus *= 2
    return None
