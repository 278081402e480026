"""A decode step on the CPU by compiled functions (csrc/cpu/): dense models with grouped attention, in float32.

Activations are in panels of 16 rows, [panels, D, 16]: a vector holds one column of 8 rows. The result for a row is the
same in every bit whatever rows are decoded with it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from r1engine.hf.architecture import Architecture
from r1engine.rollout.local.cache import KVCache
from r1engine.rollout.local.weights import GroupedWeights, Mlp, Weights
from r1kernels import cpu_lib

PANEL = 16
ROWS, ADD, GATE = 0, 1, 2  # what becomes of a product, see csrc/cpu/linear.cpp


def is_compiled(arch: Architecture, weights: Weights) -> bool:
    """Whether `step` can run this model on this machine."""
    is_dense = arch.mla is None and arch.moe is None and not arch.has_output_bias
    return is_dense and arch.head_dim % 8 == 0 and cpu_lib.takes(weights.embedding)


def step(
    arch: Architecture, weights: Weights, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache
) -> torch.Tensor:
    """`Decoder.step` without experts: [N, V] logits. Of the cache's mask nothing is read and nothing changed."""
    x, rows = to_panels(weights.embedding[tokens]), len(tokens)
    scratch = torch.empty_like(x)
    qkv = x.new_empty(rows, (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim)
    mixed = x.new_zeros(len(x), arch.num_heads * arch.head_dim, PANEL)
    logits = x.new_empty(rows, arch.vocab_size)
    sizes = (rows, arch.num_heads, arch.num_kv_heads, arch.head_dim, cache.capacity)

    def product(
        source: torch.Tensor,
        norm: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
        ending: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        shape = (rows, source.shape[1], out.shape[1])
        cpu_lib.call("r1_cpu_panel_linear", source, norm, weight, bias, scratch, out, *shape, ending, arch.norm_eps)

    for index, layer in enumerate(weights.layers):
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, GroupedWeights) and isinstance(mlp, Mlp)
        product(x, layer.attention_norm, attention.qkv, qkv, ROWS, attention.qkv_bias)
        norms, where = (attention.query_norm, attention.key_norm), (cache.rotations, positions, *cache.layers[index])
        factors = (arch.softmax_scale, arch.norm_eps)
        cpu_lib.call("r1_cpu_decode_attention", qkv, *norms, *where, mixed, *sizes, *factors)
        product(mixed, None, layer.output, x, ADD)
        inner = x.new_empty(len(x), len(mlp.gate_up) // 2, PANEL)
        product(x, layer.mlp_norm, mlp.gate_up, inner, GATE)
        product(inner, None, mlp.down, x, ADD)
    product(x, weights.final_norm, weights.head, logits, ROWS)
    return logits


def to_panels(x: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [ceil(N / 16), D, 16], filled up with rows of zeros."""
    return pad(x, (0, 0, 0, -len(x) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
