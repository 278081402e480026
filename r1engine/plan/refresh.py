"""The weights into the generators: seconds and bytes on the links, from the bytes and the peaks."""

from __future__ import annotations

import math
from dataclasses import replace

from r1engine.hf.architecture import Architecture
from r1engine.plan.hardware import Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import WEIGHT, Job
from r1engine.plan.sizes import rank_parameters, total_parameters


def refresh(
    arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by cause, and GB that the busiest GPU moves by kind of traffic."""
    if job.generators is None:
        return _beside(arch, layout, job, gpu, assumed)
    if job.has_receivers:
        return _to_receivers(arch, layout, job, gpu, assumed)
    model = job.generator_bytes * total_parameters(arch) / 1e9
    card, links = (rate * assumed.bandwidth_efficiency for rate in (gpu.network_gb_s, gpu.nvlink_gb_s))
    # Each rank sends its share to all servers, one rank at a time: an SGLang server takes one broadcast after the
    # other. Inside a server's node the tensors go on over NVLink, at the same time.
    seconds = max(model / card / assumed.refresh_cards, model / links)
    return {"broadcast": seconds}, {"refresh sent": model / layout.gpus, "refresh received": model}


def _to_receivers(
    arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed
) -> tuple[dict[str, float], dict[str, float]]:
    """From all ranks at once: the busiest adapter on either side, then inside a server's node what is passed on.

    A routed expert goes to the GPUs that serve it, everything else to all of a server, each once over the network to a
    node (rollout/sglang/delivery.py). Calls between the processes are not counted.
    """
    gigabytes = job.generator_bytes / 1e9
    of_expert = job.generator_tensor // job.generator_expert  # GPUs of a generator that need the same experts
    sharing, sharing_expert = min(job.generator_tensor, gpu.per_node), min(of_expert, gpu.per_node)
    nodes, nodes_of_expert = math.ceil(job.generator_tensor / gpu.per_node), math.ceil(of_expert / gpu.per_node)
    whole = replace(layout, gpus=layout.pipeline, tensor=1, expert=1, expert_tensor=1, context=1)
    sent, needed, received = 0.0, 0.0, 0.0  # GB: by a GPU of the trainer; by one of a generator, and over the network
    for stage in range(layout.pipeline):
        terms = rank_parameters(arch, whole, stage)
        experts = gigabytes * terms.get("experts", 0)
        others = gigabytes * sum(terms.values()) - experts
        to_all = (job.generators or 0) * (experts * nodes_of_expert + others * nodes)
        sent = max(sent, to_all * layout.pipeline / layout.gpus)
        needed += experts / job.generator_expert + others
        received += experts / job.generator_expert / sharing_expert + others / sharing
    card, links = (rate * assumed.bandwidth_efficiency for rate in (gpu.network_gb_s, gpu.nvlink_gb_s))
    seconds = {"network": max(sent, received) / card, "inside the servers' nodes": (needed - received) / links}
    return seconds, {"refresh sent": sent, "refresh received": needed}


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
