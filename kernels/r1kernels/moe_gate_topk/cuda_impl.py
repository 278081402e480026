"""Launches csrc/moe_gate_topk.cu and csrc/moe_gate_backward.cu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r1kernels import cuda_lib


@dataclass(frozen=True)
class _Options:
    topk: int
    n_group: int
    topk_group: int
    is_softmax: bool
    norm: bool
    scale: float


def gate(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(logits [T, E] float32 or bfloat16, ...) -> (ids, weights, counts, sequence_counts, sequence_scores)."""
    logits = logits.float()
    bias = None if bias is None else bias.float().contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    options = _Options(topk, n_group, topk_group, score == "softmax", norm, float(scale))
    ids, weights, counts, sequence_counts, sequence_scores = _Gate.apply(logits, bias, replay_ids, cu_seqlens, options)
    if cu_seqlens is None:
        return ids, weights, counts, None, None
    return ids, weights, counts, sequence_counts, sequence_scores


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        replay_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        options: _Options,
    ) -> tuple[torch.Tensor, ...]:
        num_tokens, num_experts = logits.shape
        new = logits.new_empty
        ids = new(num_tokens, options.topk, dtype=torch.int32)
        weights = new(num_tokens, options.topk, dtype=torch.float32)
        counts = new(num_experts, dtype=torch.int32)
        normalizer = None if cu_seqlens is None else new(num_tokens, dtype=torch.float32)
        if num_tokens:
            cuda_lib.launch(
                "r1_moe_gate_topk",
                *(logits, bias, replay_ids, ids, weights, counts, normalizer),
                *(num_tokens, num_experts, options.topk, options.n_group, options.topk_group),
                *(int(options.is_softmax), int(options.norm), options.scale),
            )
        else:
            counts.zero_()
        num_sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        sequence_counts = counts.new_empty(num_sequences, num_experts)
        sequence_scores = weights.new_empty(num_sequences, num_experts)
        if cu_seqlens is not None:
            cuda_lib.launch(
                "r1_moe_gate_sums",
                *(logits, ids, normalizer, cu_seqlens, sequence_counts, sequence_scores),
                *(num_tokens, num_experts, options.topk, num_sequences, int(options.is_softmax)),
            )
        ctx.save_for_backward(logits, ids, cu_seqlens)
        ctx.options = options
        ctx.mark_non_differentiable(ids, counts, sequence_counts)
        return ids, weights, counts, sequence_counts, sequence_scores

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, grad_weights, _, _, grad_scores = grads
        logits, ids, cu_seqlens = ctx.saved_tensors
        options = ctx.options
        grad_logits = torch.empty_like(logits)
        if logits.numel():
            cuda_lib.launch(
                "r1_moe_gate_backward",
                *(logits, ids, grad_weights.contiguous()),
                *(None if cu_seqlens is None else grad_scores.contiguous(), cu_seqlens, grad_logits),
                *(*logits.shape, options.topk, 0 if cu_seqlens is None else len(cu_seqlens) - 1),
                *(int(options.is_softmax), int(options.norm), options.scale),
            )
        return grad_logits, None, None, None, None
