"""Parameters of a model by term, as a whole and on one rank, and the floating-point work of a token.

Counted from the shapes of `hf/tensors.py`, and split as Megatron splits them: `model/stage_sizes.py` builds the true
model without memory, and tests hold the two equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

from r1engine.hf.architecture import Architecture
from r1engine.hf.tensors import Shapes, attention_shapes, latent_attention_shapes, mlp_shapes
from r1engine.plan.layout import Layout


def query_dim(arch: Architecture) -> int:
    """Of a head's query and key, rotary part included."""
    return arch.mla.nope_dim + arch.mla.rope_dim if arch.mla else arch.head_dim


def value_dim(arch: Architecture) -> int:
    """Of a head's value."""
    return arch.mla.value_dim if arch.mla else arch.head_dim


def key_value_dim(arch: Architecture) -> int:
    """Numbers in the keys and values of a token that one layer's attention reads, of all heads."""
    if arch.mla:
        return arch.num_heads * (query_dim(arch) + value_dim(arch))
    return 2 * arch.num_kv_heads * arch.head_dim


def elements(shapes: Shapes) -> int:
    """Of all these tensors."""
    return sum(math.prod(shape) for shape in shapes.values())


def mlp_parameters(arch: Architecture, size: int) -> int:
    """Of an MLP of this intermediate size."""
    return elements(mlp_shapes(arch, size))


def expert_parameters(arch: Architecture) -> int:
    """Of one routed expert; 0 for a dense model."""
    return mlp_parameters(arch, arch.moe.intermediate_size) if arch.moe else 0


@cache
def attention_parameters(arch: Architecture, tp: int) -> dict[str, int]:
    """Of one layer on one tensor-parallel rank: "split" (each rank another part) and "copied" (norms, output bias)."""
    shapes = latent_attention_shapes(arch) if arch.mla else attention_shapes(arch)
    copied = {name: shape for name, shape in shapes.items() if "norm" in name or name == "o_proj.bias"}
    return {"split": (elements(shapes) - elements(copied)) // tp, "copied": elements(copied)}


def layer_parameters(arch: Architecture, layer: int, layout: Layout) -> dict[str, int]:
    """Of one decoder layer on one rank, by term; the bias of the router is a buffer and does not count."""
    attention, moe = attention_parameters(arch, layout.tensor), arch.moe
    terms = {"attention": attention["split"] + attention["copied"], "norms": 2 * arch.hidden_size}
    if not arch.has_experts(layer):
        return terms | {"dense mlp": mlp_parameters(arch, arch.intermediate_size) // layout.tensor}
    assert moe is not None
    return terms | {
        "router": arch.hidden_size * moe.num_experts,
        "shared experts": mlp_parameters(arch, moe.shared_size) // layout.tensor,
        "experts": moe.num_experts // layout.expert * expert_parameters(arch) // layout.expert_tensor,
    }


@lru_cache(maxsize=4096)  # callers only read
def rank_parameters(arch: Architecture, layout: Layout, stage: int, *, with_mtp: bool = False) -> dict[str, int]:
    """Parameters of one rank of a pipeline stage, by term."""
    total: dict[str, int] = {}

    def add(terms: dict[str, int]) -> None:
        for name, count in terms.items():
            total[name] = total.get(name, 0) + count

    for layer in layout.stage_layers(arch.num_layers)[stage]:
        add(layer_parameters(arch, layer, layout))
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    matrix = -(-arch.vocab_size // layout.tensor) * arch.hidden_size
    if is_first:
        add({"embedding": matrix})
    if is_last:
        add({"norms": arch.hidden_size})
        if arch.head == "score":
            add({"score": arch.hidden_size})
        elif not (arch.is_tied and is_first):
            add({"output": matrix})
        if with_mtp:
            for _ in range(arch.num_mtp_layers):
                add(layer_parameters(arch, arch.num_layers, layout))
                add({"mtp projection": 2 * arch.hidden_size**2 // layout.tensor, "norms": 3 * arch.hidden_size})
    return total


def total_parameters(arch: Architecture, *, with_mtp: bool = False) -> int:
    """Of the whole model; a multi-token-prediction module shares embedding and output matrix."""
    return sum(rank_parameters(arch, Layout(gpus=1), 0, with_mtp=with_mtp).values())


def active_parameters(arch: Architecture) -> int:
    """Parameters that one token passes through; the embedding counts in full, as DeepSeek counts it."""
    if arch.moe is None:
        return total_parameters(arch)
    idle = arch.moe.num_experts - arch.moe.top_k
    return total_parameters(arch) - arch.moe.num_layers * idle * expert_parameters(arch)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one token's forward pass, whole model."""

    dense: float  # projections, dense and shared MLPs, output matrix or score, router
    linears: float  # of these, what model.fp8 takes to FP8
    experts: float
    attention_per_position: float  # of scores and values, for each token that is looked back at

    def total(self, mean_context: float) -> float:
        return self.dense + self.experts + self.attention_per_position * mean_context


def forward_work(arch: Architecture) -> Work:
    """2 operations for each matrix element and token; attention grows with the tokens before."""
    hidden, moe = arch.hidden_size, arch.moe
    linears = attention_parameters(arch, 1)["split"] * arch.num_layers
    dense_layers = arch.num_layers - (moe.num_layers if moe else 0)
    linears += dense_layers * mlp_parameters(arch, arch.intermediate_size)
    others, experts = (1 if arch.head == "score" else arch.vocab_size) * hidden, 0
    if moe is not None:
        linears += moe.num_layers * mlp_parameters(arch, moe.shared_size)
        others += moe.num_layers * hidden * moe.num_experts
        experts = moe.num_layers * moe.top_k * expert_parameters(arch)
    kept = arch.num_layers * hidden * (arch.mla.kv_rank + arch.mla.rope_dim) if arch.mla else 0
    return Work(
        dense=2.0 * (linears + others),
        linears=2.0 * (linears - kept),
        experts=2.0 * experts,
        attention_per_position=2.0 * arch.num_layers * arch.num_heads * (query_dim(arch) + value_dim(arch)),
    )


def latent_work(arch: Architecture) -> float:
    """Operations of a token's forward pass that make keys and values out of its latents; 0 without latents."""
    if arch.mla is None:
        return 0.0
    return 2.0 * arch.num_layers * arch.mla.kv_rank * arch.num_heads * (arch.mla.nope_dim + arch.mla.value_dim)
