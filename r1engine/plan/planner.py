"""One plan: a model, a layout, a job and a GPU put together; does it fit, what breaks first, what frees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from r1engine.config.rl import batch_problems
from r1engine.hf.architecture import Architecture
from r1engine.hf.layout import fp8_problem
from r1engine.plan.hardware import GIB, Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import PHASE_TERMS, Job, StageMemory, host_bytes, stage_memory
from r1engine.plan.phases import Phase, generator_slots, model_flops, phases
from r1engine.plan.sizes import active_parameters, total_parameters


@dataclass(frozen=True)
class Plan:
    """What `r1engine plan` shows; computed when asked for, as a search throws most plans away."""

    arch: Architecture
    layout: Layout
    job: Job
    gpu: Gpu
    assumed: Assumed

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Memory of a rank of each pipeline stage."""
        parts = (self.arch, self.layout, self.job, self.gpu, self.assumed)
        return [stage_memory(*parts, stage) for stage in range(self.layout.pipeline)]

    @cached_property
    def host_gib(self) -> dict[str, float]:
        """Host memory of the fullest node."""
        return host_bytes(self.arch, self.layout, self.job, self.gpu)

    @cached_property
    def phases(self) -> list[Phase]:
        """Of one rollout and its updates, in order."""
        return phases(self.arch, self.layout, self.job, self.gpu, self.assumed)

    @property
    def worst(self) -> StageMemory:
        """The stage whose training or log-probability phase needs most."""
        return max(self.stages, key=lambda m: max(sum(m.training.values()), sum(m.logprobs.values())))

    @property
    def peak(self) -> tuple[str, float]:
        """Phase and GiB of the highest use of any GPU."""
        return max((stage.peak() for stage in self.stages), key=lambda item: item[1])

    @property
    def gpus(self) -> int:
        """Of trainer and generators."""
        return self.layout.gpus + self.job.generator_gpus

    @cached_property
    def seconds(self) -> float:
        """Of one rollout and its updates; generators that draw ahead on their own GPUs work meanwhile."""
        times = {phase.name: phase.total for phase in self.phases}
        total = sum(times.values())
        if not (self.job.is_ahead and self.job.generators):
            return total
        both = times["refresh"] + times["switch"]
        return both + max(times["generate"], total - times["generate"] - both)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs of the update over what its seconds could have done."""
        update = next(phase.total for phase in self.phases if phase.name == "update")
        return model_flops(self.arch, self.job) / (update * self.layout.gpus * self.gpu.bf16_tflops * 1e12)

    def limits(self) -> list[str]:
        """What does not fit, the first to break first; empty for a plan that runs."""
        found = []
        phase, gib = self.peak
        if gib > self.gpu.memory_gib:
            largest = max(getattr(self.worst, PHASE_TERMS[phase]).items(), key=lambda item: item[1])
            found.append(
                f"GPU memory in {phase}: {gib:.1f} GiB of {self.gpu.memory_gib} ({largest[0]} {largest[1]:.1f} GiB)"
            )
        if self.job.generates and generator_slots(self.arch, self.job, self.gpu, self.assumed) < 1:
            weights = self.job.generator_bytes * total_parameters(self.arch) / self.job.generator_tensor / GIB
            found.append(
                f"generator: {weights:.1f} GiB of weights on each of {self.job.generator_tensor} GPUs leave no room "
                f"for one sequence in {self.assumed.kv_pool_share * self.gpu.memory_gib:.1f} GiB"
            )
        host = sum(self.host_gib.values())
        if host > self.gpu.host_memory_gib:
            found.append(f"host memory: {host:.0f} GiB of {self.gpu.host_memory_gib:.0f} on a node")
        return found

    @cached_property
    def fits(self) -> bool:
        return not self.limits()


def layout_problem(arch: Architecture, layout: Layout, job: Job) -> str | None:
    """What does not divide, or is no shard for FP8; None for a layout that can run."""
    if problem := layout.problem(arch):
        return problem
    problems = batch_problems(job.questions, job.group_size, job.minibatches, layout.data) if job.generates else []
    if problems:
        return "; ".join(problems)
    return fp8_problem(arch, layout.tensor, "fused", is_sequence_parallel=layout.tensor > 1) if job.fp8 else None


def make_plan(arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed) -> Plan:
    """Put the parts together.

    Raises:
        ValueError: the layout does not divide the model, the GPUs or the batch, or its shards are not for FP8; every
            problem is named.
    """
    if problem := layout_problem(arch, layout, job):
        raise ValueError(f"plan: {layout.describe()} on {layout.gpus} GPUs: {problem}")
    if job.generates and job.generators is None and layout.gpus % job.generator_tensor:
        raise ValueError(f"plan: generators of {job.generator_tensor} GPUs do not divide {layout.gpus} GPUs")
    return Plan(arch, layout, job, gpu, assumed)


def knobs(plan: Plan) -> list[tuple[str, Plan]]:
    """Single changes that lower the peak, the one that frees most first."""
    layout, job, ways = plan.layout, plan.job, plan.job.generator_tensor
    changes: list[tuple[str, Layout, Job]] = [
        ("model.recompute=true", replace(layout, recompute="full"), job),
        ("parallel.distributed_optimizer=true", replace(layout, distributed_optimizer=True), job),
        ("optimizer.offload=true", replace(layout, optimizer_offload=True), job),
        (f"max_row_tokens={job.row_tokens // 2}", layout, replace(job, row_tokens=job.row_tokens // 2)),
        (f"parallel.expert={2 * layout.expert}", replace(layout, expert=2 * layout.expert), job),
        (f"parallel.context={2 * layout.context}", replace(layout, context=2 * layout.context), job),
        (f"parallel.tensor={2 * layout.tensor}", replace(layout, tensor=2 * layout.tensor), job),
        (
            f"parallel.pipeline={2 * layout.pipeline}",
            replace(layout, pipeline=2 * layout.pipeline, first_stage=None, last_stage=None),
            job,
        ),
    ]
    if job.generates:
        if job.slots is None:
            changes.append((f"rollout.sglang.tensor={2 * ways}", layout, replace(job, generator_tensor=2 * ways)))
        elif job.slots > 1:
            changes.append((f"rollout.slots={job.slots // 2}", layout, replace(job, slots=job.slots // 2)))
    found = []
    for name, new_layout, new_job in changes:
        if layout_problem(plan.arch, new_layout, new_job):
            continue
        if new_job.generates and new_job.generators is None and new_layout.gpus % new_job.generator_tensor:
            continue
        if new_job.row_tokens < new_job.longest:
            continue
        changed = make_plan(plan.arch, new_layout, new_job, plan.gpu, plan.assumed)
        if _most(changed) < _most(plan) - 0.05 or len(changed.limits()) < len(plan.limits()):
            found.append((name, changed))
    return sorted(found, key=lambda item: (len(item[1].limits()), _most(item[1])))


def _most(plan: Plan) -> float:
    """GiB of the fullest GPU, the pool of a server apart: that takes what there is."""
    phases = ("training", "logprobs", "generating") if plan.job.slots is not None else ("training", "logprobs")
    return max(sum(getattr(stage, terms).values()) for stage in plan.stages for terms in phases)


def describe_model(arch: Architecture) -> dict[str, int]:
    """Parameter counts as the papers give them: the main model, with MTP, and those active for a token."""
    return {
        "parameters_total": total_parameters(arch),
        "parameters_with_mtp": total_parameters(arch, with_mtp=True),
        "parameters_active": active_parameters(arch),
    }
