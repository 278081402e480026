"""The weights into the generators: seconds and bytes on the links, from the bytes and the peaks."""

from __future__ import annotations

from r1engine.hf.architecture import Architecture
from r1engine.plan.hardware import Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import WEIGHT, Job
from r1engine.plan.sizes import total_parameters


def refresh(
    arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by cause, and GB that the busiest GPU moves by kind of traffic."""
    if job.generators is None:
        return _beside(arch, layout, job, gpu, assumed)
    model = job.generator_bytes * total_parameters(arch) / 1e9
    card, links = (rate * assumed.bandwidth_efficiency for rate in (gpu.network_gb_s, gpu.nvlink_gb_s))
    # Each rank sends its share to all servers, one rank at a time: an SGLang server takes one broadcast after the
    # other. Inside a server's node the tensors go on over NVLink, at the same time.
    seconds = max(model / card / assumed.refresh_cards, model / links)
    return {"broadcast": seconds}, {"refresh sent": model / layout.gpus, "refresh received": model}


def _beside(
    arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed
) -> tuple[dict[str, float], dict[str, float]]:
    """Into generators on the trainer's GPUs: what a GPU's own rank does not hold crosses the links, then a copy."""
    received = job.generator_bytes * total_parameters(arch) / job.generator_tensor / 1e9
    span = layout.tensor * layout.pipeline * max(1, layout.expert * layout.expert_tensor // layout.tensor)
    rate = (gpu.nvlink_gb_s if span <= gpu.per_node else gpu.network_gb_s) * assumed.bandwidth_efficiency
    gathered = WEIGHT * total_parameters(arch) / 1e9 if span > 1 else 0.0
    # Every rank of a generator gathers all of it; the GPUs of a node share what comes from other nodes.
    crossing = gathered / min(job.generator_tensor, gpu.per_node)
    copy = received / (gpu.hbm_tb_s * 1e3 * assumed.bandwidth_efficiency)
    return {"gather": crossing / rate, "copy": copy}, {"refresh": crossing + received}
