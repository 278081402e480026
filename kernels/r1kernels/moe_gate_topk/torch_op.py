"""torch.ops.r1kernels.moe_gate_topk: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

from typing import Any

import torch

from r1kernels.moe_gate_topk import Gate, moe_gate_topk
from r1kernels.moe_plan.torch_op import filled
from r1kernels.tracing import autograd_in_op


@torch.library.custom_op("r1kernels::moe_gate_topk", mutates_args=())
def gate_tensors(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    n_group: int,
    topk_group: int,
    score: str,
    norm: bool,
    scale: float,
    replay_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Gate, the floating-point ones first; those of sequences are empty without cu_seqlens."""
    given: dict[str, Any] = {"topk": topk, "n_group": n_group, "topk_group": topk_group, "score": score, "norm": norm}
    given |= {"scale": scale, "replay_ids": replay_ids, "cu_seqlens": cu_seqlens, "impl": impl}
    ids, weights, counts, sequence_counts, sequence_scores = moe_gate_topk(logits, bias, **given)
    return weights, filled(sequence_scores, weights), ids, counts, filled(sequence_counts, counts)


@gate_tensors.register_fake
def _(logits, bias, topk, n_group, topk_group, score, norm, scale, replay_ids, cu_seqlens, impl):
    (tokens, experts), sums = logits.shape, 0 if cu_seqlens is None else (cu_seqlens.shape[0] - 1, logits.shape[1])
    ids = logits.new_empty(tokens, topk, dtype=torch.int32)
    weights = logits.new_empty(tokens, topk, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights, weights.new_empty(sums), ids, ids.new_empty(experts), ids.new_empty(sums)


@torch.library.custom_op("r1kernels::moe_gate_topk_backward", mutates_args=())
def logits_gradient(
    to_weights: torch.Tensor,
    to_scores: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    score: str,
    norm: bool,
    scale: float,
    impl: str | None,
) -> torch.Tensor:
    """Gradient of the logits, from the same choice replayed: it depends on the chosen experts, not on why they are."""
    given: dict[str, Any] = {"topk": ids.shape[1], "n_group": 1, "topk_group": 1, "score": score, "norm": norm}
    given |= {"scale": scale, "replay_ids": ids, "cu_seqlens": cu_seqlens, "impl": impl}
    with autograd_in_op():
        x = logits.detach().requires_grad_()
        found = moe_gate_topk(x, **given)
        if found.sequence_scores is None:
            return torch.autograd.grad(found.weights, x, to_weights)[0]
        return torch.autograd.grad([found.weights, found.sequence_scores], x, [to_weights, to_scores])[0]


@logits_gradient.register_fake
def _(to_weights, to_scores, logits, *rest):
    return torch.empty_like(logits)


def _setup(ctx, inputs, output):
    *_, cu_seqlens, ctx.impl = inputs
    ctx.save_for_backward(inputs[0], output[2], cu_seqlens)
    ctx.score = inputs[5:8]


def _backward(ctx, to_weights, to_scores, *_others):
    return logits_gradient(to_weights, to_scores, *ctx.saved_tensors, *ctx.score, ctx.impl), *[None] * 10


gate_tensors.register_autograd(_backward, setup_context=_setup)


def traced(logits: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> Gate:
    """`moe_gate_topk` as one node of a graph; `arguments` as the op has them."""
    found = gate_tensors(logits, None if bias is None else bias.detach(), *arguments)
    weights, sequence_scores, ids, counts, sequence_counts = found
    has_sums = arguments[-2] is not None  # cu_seqlens
    return Gate(ids, weights, counts, *((sequence_counts, sequence_scores) if has_sums else (None, None)))
