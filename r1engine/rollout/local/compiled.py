"""The model by compiled functions (csrc/cpu/) on the CPU: dense models with grouped attention, in float32.

Prompts, sequences that go on and decode steps are the same here: new tokens, each behind its own keys and values. The
result for a token is the same in every bit whichever of these it is, and whatever tokens are run with it.

Activations are in panels of 16 tokens, [panels, D, 16]: a vector holds one column of 8 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from r1engine.hf.architecture import Architecture
from r1engine.rollout.local.new_tokens import NewTokens
from r1engine.rollout.local.weights import GroupedWeights, Mlp, Weights
from r1kernels import cpu_lib

PANEL = 16
ROWS, ADD, GATE = 0, 1, 2  # what becomes of a product, see csrc/cpu/linear.cpp


def is_compiled(arch: Architecture, weights: Weights) -> bool:
    """Whether `run` can run this model on this machine."""
    is_dense = arch.mla is None and arch.moe is None and not arch.has_output_bias
    return is_dense and arch.head_dim % 8 == 0 and cpu_lib.takes(weights.embedding)


def run(
    arch: Architecture, weights: Weights, new: NewTokens, rotations: torch.Tensor, layers: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What the decoder makes of new tokens, behind its last norm: [panels, D, 16].

    Args:
        new:       of each row of keys and values all tokens are neighbours.
        rotations: [at least the longest sequence, head_dim / 2] complex64, as of `rotary_table`.
        layers:    per layer [2, rows, kv_heads, places, head_dim]: keys, then values; takes those of the new tokens.
    """
    x, count = to_panels(weights.embedding[new.ids]), len(new.ids)
    scratch = torch.empty_like(x)
    qkv = x.new_empty(count, (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim)
    mixed = x.new_zeros(len(x), arch.num_heads * arch.head_dim, PANEL)
    inner = x.new_empty(len(x), arch.intermediate_size, PANEL)
    sizes = (count, arch.num_heads, arch.num_kv_heads, arch.head_dim, layers[0].shape[3])
    factors = (arch.softmax_scale, arch.norm_eps)

    def product(
        source: torch.Tensor,
        norm: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
        ending: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        shape = (count, source.shape[1], out.shape[1])
        cpu_lib.call("r1_cpu_panel_linear", source, norm, weight, bias, scratch, out, *shape, ending, arch.norm_eps)

    for layer, kv in zip(weights.layers, layers, strict=True):
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, GroupedWeights) and isinstance(mlp, Mlp)
        product(x, layer.attention_norm, attention.qkv, qkv, ROWS, attention.qkv_bias)
        norms, where = (attention.query_norm, attention.key_norm), (rotations, *new[1:], *kv)
        cpu_lib.call("r1_cpu_cached_attention", qkv, *norms, *where, mixed, *sizes, *factors)
        product(mixed, None, layer.output, x, ADD)
        product(x, layer.mlp_norm, mlp.gate_up, inner, GATE)
        product(inner, None, mlp.down, x, ADD)
    cpu_lib.call("r1_cpu_panel_norm", x, weights.final_norm, scratch, count, arch.hidden_size, arch.norm_eps)
    return scratch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of x [N, D]; where the library takes it, each row is the same in every bit whatever is beside it."""
    return project(to_panels(x), len(x), weight, bias) if cpu_lib.takes(weight) else F.linear(x, weight, bias)


def project(panels: torch.Tensor, count: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same of N rows in panels: [N, outputs]."""
    out, sizes = panels.new_empty(count, len(weight)), (count, panels.shape[1], len(weight))
    cpu_lib.call("r1_cpu_panel_linear", panels, None, weight, bias, None, out, *sizes, ROWS, 0.0)
    return out


def to_panels(x: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [ceil(N / 16), D, 16], filled up with rows of zeros."""
    return F.pad(x, (0, 0, 0, -len(x) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def from_panels(x: torch.Tensor, count: int) -> torch.Tensor:
    """[ceil(N / 16), D, 16] -> [N, D]."""
    return x.transpose(1, 2).flatten(0, 1)[:count]
