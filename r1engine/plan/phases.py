"""Seconds and bytes of each phase of an iteration, from the work, the peaks and the assumed efficiencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1engine.hf.architecture import Architecture
from r1engine.hf.kv_shape import kv_bytes
from r1engine.plan.hardware import GIB, Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import GRADIENT, OPTIMIZER, WEIGHT, Job, optimizer_bytes
from r1engine.plan.refresh import refresh
from r1engine.plan.sizes import (
    expert_parameters,
    forward_work,
    latent_work,
    rank_parameters,
    total_parameters,
)


@dataclass(frozen=True)
class Phase:
    """One phase: seconds by cause, and GB that each GPU moves by kind of traffic."""

    name: str
    seconds: dict[str, float]
    traffic_gb: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def phases(arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed) -> list[Phase]:
    """The phases of one rollout and its updates, or of one supervised step, in order."""
    if not job.generates:
        return [
            _passes("update", arch, layout, job, gpu, assumed, job.inner_epochs, is_update=True),
            _optimizer(arch, layout, job, gpu, assumed),
        ]
    forwards = job.has_reference + (job.minibatches * job.inner_epochs > 1)
    return [
        _generate(arch, layout, job, gpu, assumed),
        _passes("logprobs", arch, layout, job, gpu, assumed, forwards, is_update=False),
        _passes("update", arch, layout, job, gpu, assumed, job.inner_epochs, is_update=True),
        _optimizer(arch, layout, job, gpu, assumed),
        Phase("refresh", *refresh(arch, layout, job, gpu, assumed)),
        _switch(arch, layout, job, gpu, assumed),
    ]


# ---------------------------------------------------------------------- generation


def generator_slots(arch: Architecture, job: Job, gpu: Gpu, assumed: Assumed) -> int:
    """Sequences that one generator decodes at once: as set, else those of mean length whose keys and values fit in its
    pool."""
    if job.slots is not None:
        return job.slots
    weights = job.generator_bytes * total_parameters(arch)
    pool = job.generator_tensor * assumed.kv_pool_share * gpu.memory_gib * GIB - weights
    copies = (
        1 if arch.mla else max(1, job.generator_tensor // arch.num_kv_heads)
    )  # attention-parallel MLA keeps one copy
    return int(pool / (kv_bytes(arch) * copies * (job.prompt_tokens + job.mean_tokens)))


def decode_step(arch: Architecture, sequences: float, context: float, job: Job, gpu: Gpu, assumed: Assumed) -> float:
    """Seconds in which a generator makes one token for each of `sequences`."""
    bandwidth = job.generator_tensor * gpu.hbm_tb_s * 1e12 * assumed.bandwidth_efficiency
    read = job.generator_bytes * _weights_touched(arch, sequences) + sequences * context * kv_bytes(arch)
    work = sequences * forward_work(arch).total(context)
    compute = work / (job.generator_tensor * gpu.bf16_tflops * 1e12 * assumed.dense_efficiency)
    latency = arch.num_layers * assumed.decode_layer_us * 1e-6
    return max(read / bandwidth, compute) + latency + _decode_traffic_seconds(arch, sequences, job, gpu, assumed)


def _decode_traffic_gb(arch: Architecture, sequences: float, job: Job, gpu: Gpu) -> float:
    """GB that each GPU of a generator sends for one token of each sequence.

    Within a node tensor parallelism reduces twice a layer. A mixture of experts over several nodes is served with
    attention split by sequence and experts over all GPUs: out in fp8, back in bf16.
    """
    ways = job.generator_tensor
    if arch.moe and ways > gpu.per_node:
        return sequences / ways * arch.num_layers * arch.moe.top_k * arch.hidden_size * 3 / 1e9
    return sequences * arch.num_layers * 2 * 2 * arch.hidden_size * WEIGHT * (ways - 1) / ways / 1e9


def _decode_traffic_seconds(arch: Architecture, sequences: float, job: Job, gpu: Gpu, assumed: Assumed) -> float:
    if job.generator_tensor == 1:
        return 0.0
    across = max(0.0, 1 - gpu.per_node / job.generator_tensor)
    per_gb = (across / gpu.network_gb_s + (1 - across) / gpu.nvlink_gb_s) / assumed.bandwidth_efficiency
    latency = assumed.reduce_across_us if across else assumed.reduce_us
    return 2 * arch.num_layers * latency * 1e-6 + _decode_traffic_gb(arch, sequences, job, gpu) * per_gb


def _weights_touched(arch: Architecture, sequences: float) -> float:
    """Parameters read for a batch: experts that no token of the batch chose are not."""
    moe = arch.moe
    if moe is None:
        return total_parameters(arch)
    missed = (1 - moe.top_k / moe.num_experts) ** sequences
    return total_parameters(arch) - missed * moe.num_layers * moe.num_experts * expert_parameters(arch)


def _generate(arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed) -> Phase:
    """Full batches while prompts last, then the longest completions alone."""
    generators = job.generators or max(1, layout.gpus // job.generator_tensor)
    mine = math.ceil(job.completions / generators)
    slots = max(1, min(mine, generator_slots(arch, job, gpu, assumed)))
    context = job.prompt_tokens + job.mean_tokens / 2
    steps = mine * job.mean_tokens / slots
    tail = max(0.0, job.max_tokens - steps)  # the slowest sample is a whole longest completion
    prefill_work = mine / job.group_size * job.prompt_tokens * forward_work(arch).total(job.prompt_tokens / 2)
    rate = job.generator_tensor * gpu.bf16_tflops * 1e12 * assumed.dense_efficiency
    few = max(1.0, slots / 16)
    return Phase(
        "generate",
        {
            "prefill": prefill_work / rate,
            "decode": steps * decode_step(arch, slots, context, job, gpu, assumed),
            "longest completions": tail * decode_step(arch, few, job.max_tokens / 2, job, gpu, assumed),
        },
        {"decode": _decode_traffic_gb(arch, mine * job.mean_tokens, job, gpu)},
    )


# ---------------------------------------------------------------------- training


def _passes(
    name: str, arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed, count: int, *, is_update: bool
) -> Phase:
    """`count` forward passes over the rollout, or forward, recomputed forward and backward passes."""
    factor = 1 if not is_update else 4 if layout.recompute == "full" else 3
    work = forward_work(arch)
    context = _mean_context(job)
    tokens = count * job.tokens / layout.gpus * _bubble(layout, job)
    peak = gpu.bf16_tflops * 1e12 * _row_efficiency(layout, job, assumed)
    # Latent attention makes the keys and values of the whole row on every context-parallel rank.
    repeated = (layout.context - 1) * latent_work(arch)
    saved = (1 - 1 / assumed.fp8_gain) * (work.linears + repeated) if job.fp8 else 0.0
    dense = factor * tokens * (work.dense + repeated - saved + work.attention_per_position * context)
    experts = factor * tokens * work.experts * (assumed.expert_imbalance if layout.expert > 1 else 1.0)
    traffic = {
        kind: count * factor * job.tokens * per_token / 1e9 for kind, per_token in _traffic_bytes(arch, layout).items()
    }
    seconds = {
        "matrix products": dense / (peak * assumed.dense_efficiency) + experts / (peak * assumed.expert_efficiency)
    }
    passes = count * factor * job.minibatches * (job.rows(layout.data) + layout.pipeline - 1)
    launches = passes * arch.num_layers / layout.pipeline * assumed.layer_ms / 1e3
    seconds["launches"] = max(0.0, launches - seconds["matrix products"])  # they run ahead of what they launch
    for kind, gigabytes in traffic.items():
        seconds[f"{kind} traffic"] = gigabytes * _bubble(layout, job) * _seconds_per_gb(kind, layout, gpu, assumed)
    if is_update:
        reduced = _reduced_gb(arch, layout, job)
        traffic["DP"] = job.minibatches * job.inner_epochs * reduced
        seconds["DP traffic"] = traffic["DP"] * _seconds_per_gb("DP", layout, gpu, assumed)
    return Phase(name, seconds, traffic)


def _mean_context(job: Job) -> float:
    """Tokens that a token looks back at, on average over a causal sequence."""
    return (job.prompt_tokens + job.mean_tokens) / 2


def _bubble(layout: Layout, job: Job) -> float:
    """Pipeline fill and drain: (micro-batches + stages - 1) / micro-batches."""
    rows = job.rows(layout.data)
    return (rows + layout.pipeline - 1) / rows


def _row_efficiency(layout: Layout, job: Job, assumed: Assumed) -> float:
    """Small micro-batches leave a GPU idle: half speed at `small_row_tokens` a rank."""
    tokens = job.row_tokens / layout.context
    return tokens / (tokens + assumed.small_row_tokens)


def _traffic_bytes(arch: Architecture, layout: Layout) -> dict[str, float]:
    """Bytes that one GPU sends in a forward pass, for each token of the whole rollout."""
    owned = 1 / (layout.data * layout.context)  # of the rollout's tokens pass through this rank's group
    per_stage = arch.num_layers / layout.pipeline
    found = {}
    if layout.tensor > 1:  # gather and scatter around attention and MLP, ring
        found["TP"] = owned * 4 * per_stage * arch.hidden_size * WEIGHT * (layout.tensor - 1) / layout.tensor
    if arch.moe and layout.expert > 1:  # out and back
        remote = (layout.expert - 1) / layout.expert
        moe_layers = arch.moe.num_layers / layout.pipeline
        rows = owned / layout.tensor * arch.moe.top_k * remote
        found["EP"] = 2 * rows * moe_layers * arch.hidden_size * WEIGHT
    if layout.pipeline > 1:
        found["PP"] = owned / layout.tensor * arch.hidden_size * WEIGHT
    if layout.context > 1:  # keys and values, or latents, to all other ranks of the row
        width = kv_bytes(arch) / arch.num_layers / (1 if arch.mla else layout.tensor)
        found["CP"] = owned * (layout.context - 1) * per_stage * width
    return found


def _seconds_per_gb(kind: str, layout: Layout, gpu: Gpu, assumed: Assumed) -> float:
    """Of a kind of traffic: the part that stays in the node takes NVLink, the rest the network."""
    span = {
        "TP": layout.tensor,
        "EP": layout.expert * layout.expert_tensor,
        "CP": layout.tensor * layout.context,
        "DP": layout.gpus // layout.pipeline,
        "PP": layout.gpus,
    }[kind]
    across = max(0.0, 1 - gpu.per_node / span)
    return (across / gpu.network_gb_s + (1 - across) / gpu.nvlink_gb_s) / assumed.bandwidth_efficiency


def _reduced_gb(arch: Architecture, layout: Layout, job: Job) -> float:
    """Gradients scattered in fp32 and weights gathered in bf16 of one optimizer step, by the fullest rank."""
    fullest = max(_stages(arch, layout, job), key=lambda terms: sum(terms.values()))
    experts = fullest.get("experts", 0)
    dense = sum(fullest.values()) - experts
    ways, expert_ways = layout.data * layout.context, layout.expert_data
    moved = dense * (ways - 1) / ways + experts * (expert_ways - 1) / expert_ways
    return (GRADIENT + WEIGHT) * moved / 1e9


def _stages(arch: Architecture, layout: Layout, job: Job) -> list[dict[str, int]]:
    return [rank_parameters(arch, layout, stage, with_mtp=job.with_mtp) for stage in range(layout.pipeline)]


def _optimizer(arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed) -> Phase:
    steps = job.minibatches * job.inner_epochs
    state = max(optimizer_bytes(terms, layout) for terms in _stages(arch, layout, job))
    if not layout.optimizer_offload:
        seconds = {"Adam": steps * 2 * state / 1e12 / (gpu.hbm_tb_s * assumed.bandwidth_efficiency)}
        return Phase("optimizer", seconds, {})
    # The copies overlap with the CPUs' work; the sum is what it costs where they share the memory's bandwidth.
    moved = steps * (GRADIENT + WEIGHT) * state / OPTIMIZER / 1e9
    seconds = {
        "Adam on the CPUs": steps * 2 * state / 1e9 / (assumed.cpu_adam_gb_s / min(gpu.per_host, layout.gpus)),
        "gradients down, weights up": moved / (gpu.host_gb_s * assumed.bandwidth_efficiency),
    }
    return Phase("optimizer", seconds, {"PCIe": moved})


# ---------------------------------------------------------------------- between the two


def _switch(arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed) -> Phase:
    """Training state to host memory and back; the reference's weights come over once."""
    fullest = max(_stages(arch, layout, job), key=lambda terms: sum(terms.values()))
    count = sum(fullest.values())
    state = 0.0 if layout.optimizer_offload else optimizer_bytes(fullest, layout)
    moved = 2 * (WEIGHT * count + state) + (WEIGHT * count if job.has_reference else 0)
    seconds = moved / 1e9 / (gpu.host_gb_s * assumed.bandwidth_efficiency)
    return Phase("switch", {"offload and restore": seconds}, {"PCIe": moved / 1e9})


def model_flops(arch: Architecture, job: Job) -> float:
    """Of the updates of one rollout, without recomputation: what MFU counts."""
    return 3 * job.inner_epochs * job.tokens * forward_work(arch).total(_mean_context(job))
