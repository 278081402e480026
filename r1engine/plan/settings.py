"""A plan as settings of a configuration, and what other numerics than the configuration's would make of it."""

from __future__ import annotations

from dataclasses import replace

from r1engine.plan.planner import Plan
from r1engine.plan.search import search


def settings(plan: Plan) -> list[str]:
    """The plan's layout, rows and generators as `key=value`, to be put behind a configuration on the command line."""
    layout, job = plan.layout, plan.job
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual": layout.virtual,
        "first_stage_layers": layout.first_stage,
        "last_stage_layers": layout.last_stage,
        "context": layout.context,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
        "distributed_optimizer": layout.distributed_optimizer,
    }
    found = {f"parallel.{name}": value for name, value in sizes.items()} | {
        "max_row_tokens": job.row_tokens,
        "model.recompute": layout.recompute == "full",
        "model.fp8": job.fp8,
        "optimizer.offload": layout.optimizer_offload,
    }
    if job.slots is not None:
        found["rollout.slots"] = job.slots
    elif job.generates:
        found["rollout.sglang.tensor"] = job.generator_tensor
        if job.generators is not None:
            found["rollout.sglang.servers"] = job.generators
    words = {"None": "null", "True": "true", "False": "false"}
    return [f"{key}={words.get(str(value), value)}" for key, value in found.items()]


def alternatives(plan: Plan) -> list[tuple[str, Plan]]:
    """The best plan with each setting that a search leaves as it is: it changes the numbers, or needs the host."""
    layout, job = plan.layout, plan.job
    asked = [("optimizer.offload", layout.optimizer_offload, job, not layout.optimizer_offload)]
    if plan.gpu.has_fp8:
        asked.append(("model.fp8", job.fp8, replace(job, fp8=not job.fp8), layout.optimizer_offload))
    found = []
    for key, is_set, other, offload in asked:
        best = search(plan.arch, other, layout.gpus, plan.gpu, plan.assumed, optimizer_offload=offload, keep=1)
        if best and best[0].fits:
            found.append((f"{key}={'false' if is_set else 'true'}", best[0]))
    return found
