"""Bytes on the GPU of each rank and on its node, by term and by phase of the iteration."""

from __future__ import annotations

from dataclasses import dataclass

from r1engine.hf.architecture import Architecture
from r1engine.hf.kv_shape import kv_bytes
from r1engine.plan.hardware import GIB, Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.sizes import key_value_dim, query_dim, rank_parameters, total_parameters, value_dim

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes a parameter: bf16; fp32; fp32 master weight and two moments
PHASE_TERMS = {"update": "training", "logprobs": "logprobs", "generate": "generating"}  # phase -> field of StageMemory


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run asks of the hardware, besides the layout of the trainer."""

    questions: int  # of a rollout; of a supervised step its texts, pairs or labels
    group_size: int  # completions of a question; the two texts of a pair
    minibatches: int
    inner_epochs: int
    prompt_tokens: float  # mean
    mean_tokens: float  # mean completion
    max_tokens: int  # longest completion
    row_tokens: int  # of a packed row: one micro-batch
    has_reference: bool
    logits_chunk: int | None  # tokens of logits that exist at once; None: a whole row
    generator_tensor: int  # GPUs of one generator; 0: nothing is generated (supervised training)
    generator_bytes: int  # of a weight in the generator: 2 for bf16, 1 for fp8
    generator_expert: int = 1  # groups of its GPUs that the routed experts are spread over
    has_receivers: bool = False  # each GPU of a generator takes its weights itself (rollout.sglang.route)
    generators: int | None = None  # with GPUs of their own; None: as many as the trainer's GPUs hold
    slots: int | None = None  # sequences that a generator decodes at once; None: as many as its pool holds
    is_ahead: bool = False  # the next rollout is drawn while the trainer works on this one
    has_servers: bool = False  # SGLang on the trainer's GPUs: a copy of its weights waits in host memory
    refresh_bucket_gib: float = 0.5
    raters: int = 0  # reward models that the trainer runs itself; their weights wait in host memory
    with_mtp: bool = False
    fp8: bool = False  # linears of attention, dense MLPs and shared experts
    fp8_experts: bool = False  # routed experts

    @property
    def generates(self) -> bool:
        """Whether there are generators, as in reinforcement learning."""
        return self.generator_tensor > 0

    @property
    def generator_gpus(self) -> int:
        """GPUs beside the trainer's."""
        return (self.generators or 0) * self.generator_tensor

    @property
    def completions(self) -> int:
        return self.questions * self.group_size

    @property
    def tokens(self) -> float:
        """Of one rollout, prompts included."""
        return self.completions * (self.prompt_tokens + self.mean_tokens)

    @property
    def longest(self) -> float:
        """Tokens that are never split: a prompt and its completion, a text, or the two texts of a pair."""
        return self.max_tokens + self.prompt_tokens if self.generates else self.group_size * self.max_tokens

    def rows(self, data: int) -> int:
        """Micro-batches of one mini-batch on each data-parallel rank, packed to 90 %."""
        share = self.tokens / self.minibatches / data
        return max(1, round(share / (0.9 * self.row_tokens)))


@dataclass(frozen=True)
class StageMemory:
    """GiB of one pipeline stage's rank: what stays, what training adds, what generation needs."""

    stage: int
    parameters: dict[str, int]
    training: dict[str, float]
    generating: dict[str, float]
    logprobs: dict[str, float]

    def peak(self) -> tuple[str, float]:
        """The phase that needs most, and how much."""
        phases = {phase: getattr(self, terms) for phase, terms in PHASE_TERMS.items()}
        return max(((name, sum(terms.values())) for name, terms in phases.items()), key=lambda item: item[1])


def stage_memory(arch: Architecture, layout: Layout, job: Job, gpu: Gpu, assumed: Assumed, stage: int) -> StageMemory:
    """Every term of one stage; the memory of a run is its worst stage's."""
    parameters = rank_parameters(arch, layout, stage, with_mtp=job.with_mtp)
    count = sum(parameters.values())
    weights = {"weights": WEIGHT * count / GIB, "runtime": assumed.runtime_gib}
    if job.with_mtp and 0 < stage == layout.pipeline - 1:  # the last stage embeds the tokens that follow
        weights["MTP embedding"] = WEIGHT * arch.vocab_size * arch.hidden_size / layout.tensor / GIB
    in_fp8 = ("attention", "dense mlp", "shared experts") * job.fp8 + ("experts",) * job.fp8_experts
    if in_fp8:  # copies of the weights, one for each direction of the products
        weights["FP8 copies"] = 2 * sum(parameters.get(term, 0) for term in in_fp8) / GIB
    forward = {
        "logits": _logits(arch, layout, job, stage) / GIB,
        "MoE buffers": _dispatch(arch, layout, job, assumed) / GIB,
    }
    activations = _activations(arch, layout, job, assumed, stage) / GIB
    lent = "reference" if job.has_reference else "reward model"  # one at a time
    reference = {lent: WEIGHT * count / GIB} if job.has_reference or job.raters else {}
    return StageMemory(
        stage=stage,
        parameters=parameters,
        training={
            **weights,
            "gradients": GRADIENT * count / GIB,
            "optimizer": 0.0 if layout.optimizer_offload else optimizer_bytes(parameters, layout) / GIB,
            "activations": activations,
            **forward,
        },
        logprobs={**weights, **reference, "activations": _one_layer(arch, layout, job, assumed) / GIB, **forward}
        if job.generates
        else {},
        generating=_generating(arch, job, gpu, assumed) if job.generates and job.generators is None else {},
    )


def optimizer_bytes(parameters: dict[str, int], layout: Layout) -> float:
    """Adam's state of one rank: split over the ranks with the same parameters, experts over fewer."""
    experts = parameters.get("experts", 0)
    dense = sum(parameters.values()) - experts
    if not layout.distributed_optimizer:
        return OPTIMIZER * (dense + experts)
    return OPTIMIZER * (dense / (layout.data * layout.context) + experts / layout.expert_data)


def host_bytes(arch: Architecture, layout: Layout, job: Job, gpu: Gpu) -> dict[str, float]:
    """Host memory of the fullest node in GiB: what is parked there while the other half runs."""
    per_node = min(gpu.per_host, layout.gpus)
    ranks = [rank_parameters(arch, layout, stage, with_mtp=job.with_mtp) for stage in range(layout.pipeline)]
    worst = max(ranks, key=lambda terms: sum(terms.values()))
    count = sum(worst.values())
    adam = per_node * optimizer_bytes(worst, layout) / GIB
    terms = {"trainer, while generating": per_node * WEIGHT * count / GIB} if job.generates else {}
    if layout.optimizer_offload:
        terms["optimizer"] = adam
    elif job.generates:
        terms["trainer, while generating"] += adam
    if job.has_servers:
        weights = job.generator_bytes * total_parameters(arch) / GIB
        terms["servers, while training"] = per_node * weights / job.generator_tensor
    if job.has_reference:
        terms["reference"] = per_node * WEIGHT * count / GIB
    if job.raters:
        terms["reward models"] = job.raters * per_node * WEIGHT * count / GIB
    return terms


def generating_gib(arch: Architecture, job: Job, gpu: Gpu, assumed: Assumed) -> float:
    """Of one GPU of a generator."""
    return sum(_generating(arch, job, gpu, assumed).values())


def _row_share(layout: Layout, job: Job) -> float:
    """Tokens of a micro-batch on one rank between the blocks: split by context and, with sequence parallelism, TP."""
    return job.row_tokens / layout.context / layout.tensor


def _layer_bytes(arch: Architecture, layout: Layout, job: Job, assumed: Assumed, *, is_dense: bool) -> float:
    """bf16 activations that one layer's backward pass needs, for one micro-batch."""
    tokens, hidden, mla, moe = _row_share(layout, job), arch.hidden_size, arch.mla, arch.moe
    if mla:
        attention = (mla.query_rank or 0) + mla.kv_rank + mla.rope_dim
        attention += arch.num_heads * 2 * (query_dim(arch) + value_dim(arch))
    else:
        attention = 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim
    if layout.context > 1:  # every rank holds the keys and values of the whole row, and its latents
        attention += (layout.context - 1) * key_value_dim(arch)
        attention += layout.context * layout.tensor * (mla.kv_rank + mla.rope_dim) if mla else 0
    width = 6 * hidden + attention  # inputs and outputs of two norms, residuals
    if is_dense or moe is None:
        return 2 * tokens * (width + 3 * arch.intermediate_size)
    routed = moe.top_k * (3 * hidden + 3 * moe.intermediate_size / layout.expert_tensor)
    router = 2 * hidden + 4 * moe.num_experts  # the gate reads in float32
    return 2 * tokens * (width + router + 3 * moe.shared_size + assumed.expert_imbalance * routed)


def _one_layer(arch: Architecture, layout: Layout, job: Job, assumed: Assumed) -> float:
    """Working set of the widest layer: its activations once, and half as much again for temporaries."""
    kinds = {not arch.has_experts(layer) for layer in range(arch.num_layers)}
    return 1.5 * max(_layer_bytes(arch, layout, job, assumed, is_dense=kind) for kind in kinds)


def _activations(arch: Architecture, layout: Layout, job: Job, assumed: Assumed, stage: int) -> float:
    """Held for the backward pass: 1F1B keeps pipeline - stage micro-batches alive, interleaved stages more."""
    rows, virtual = job.rows(layout.data), layout.virtual
    in_flight: float = min(layout.pipeline - stage, rows)
    if virtual > 1:  # counted in chunks: the warm-up of the interleaved schedule, and one
        in_flight = (
            min(2 * (layout.pipeline - stage - 1) + (virtual - 1) * layout.pipeline + 1, rows * virtual) / virtual
        )
    layers = layout.stage_layers(arch.num_layers)[stage]
    if layout.recompute == "full":
        held = 2 * arch.hidden_size * _row_share(layout, job) * len(layers)
    else:
        held = sum(_layer_bytes(arch, layout, job, assumed, is_dense=not arch.has_experts(layer)) for layer in layers)
    return in_flight * held + _one_layer(arch, layout, job, assumed)


def _logits(arch: Architecture, layout: Layout, job: Job, stage: int) -> float:
    """bf16 logits and their gradient, of a chunk or of a whole row, on the last stage; a score has none."""
    if stage != layout.pipeline - 1 or arch.head == "score":
        return 0.0
    tokens = job.row_tokens / layout.context
    return 2 * WEIGHT * min(tokens, job.logits_chunk or tokens) * arch.vocab_size / layout.tensor


def _dispatch(arch: Architecture, layout: Layout, job: Job, assumed: Assumed) -> float:
    """Send and receive buffers of the expert all-to-all, bf16."""
    if arch.moe is None or layout.expert * layout.expert_tensor == 1:
        return 0.0
    return 2 * 2 * assumed.expert_imbalance * _row_share(layout, job) * arch.moe.top_k * arch.hidden_size


def _generating(arch: Architecture, job: Job, gpu: Gpu, assumed: Assumed) -> dict[str, float]:
    weights = job.generator_bytes * total_parameters(arch) / job.generator_tensor / GIB
    if job.slots is not None:  # the embedded generator: its pages hold one of the longest at least, more have to wait
        tokens = max(job.longest, job.slots * (job.prompt_tokens + job.mean_tokens))
        pages = tokens * kv_bytes(arch) / GIB
        return {"generator weights": weights, "keys and values": pages, "runtime": assumed.runtime_gib}
    return {
        "generator weights": weights,
        "KV pool": max(0.0, assumed.kv_pool_share * gpu.memory_gib - weights),
        "refresh buckets": 2 * job.refresh_bucket_gib,
        "runtime": assumed.runtime_gib,
    }
