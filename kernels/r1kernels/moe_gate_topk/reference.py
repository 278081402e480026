"""What moe_gate_topk means, differentiable by autograd."""

from __future__ import annotations

import torch


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
    """(logits [T, E], ...) -> (ids, weights, counts, sequence_counts, sequence_scores)."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    s = x.sigmoid() if score == "sigmoid" else x.softmax(-1)
    ids = choose_experts(s.detach() if bias is None else s.detach() + bias, topk, n_group, topk_group)
    if replay_ids is not None:
        ids = torch.where(replay_ids[:, :1] < 0, ids, replay_ids.long())
    weights = s.gather(1, ids)
    if norm:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    weights = weights * scale
    num_experts = logits.shape[1]
    one = torch.ones_like(ids, dtype=torch.int32)
    counts = one.new_zeros(num_experts).index_add_(0, ids.flatten(), one.flatten())
    if cu_seqlens is None:
        return ids.int(), weights, counts, None, None

    num_sequences = len(cu_seqlens) - 1
    token = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
    # Tokens after the last border go to a last sequence that is cut off again.
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    share = s / (s.sum(1, keepdim=True) + 1e-20) if score == "sigmoid" else s
    scores = s.new_zeros(num_sequences + 1, num_experts).index_add(0, sequence, share)
    cell = sequence[:, None] * num_experts + ids
    cells = one.new_zeros((num_sequences + 1) * num_experts).index_add_(0, cell.flatten(), one.flatten())
    return ids.int(), weights, counts, cells.view(-1, num_experts)[:-1], scores[:-1]


def choose_experts(biased: torch.Tensor, topk: int, n_group: int, topk_group: int) -> torch.Tensor:
    """biased [T, E] -> [T, K] int64, the best experts of the best groups; equal scores: the lowest index first."""
    biased = torch.where(biased.isnan(), -torch.inf, biased)
    grouped = biased.unflatten(1, (n_group, -1))  # [T, n_group, E / n_group]
    group_score = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
    best = group_score.argsort(dim=1, descending=True, stable=True)[:, :topk_group]
    is_allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, True)
    is_allowed = is_allowed[:, :, None].expand_as(grouped).flatten(1)
    # By score, then allowed ones first: an expert of a foreign group loses even to -inf.
    order = biased.argsort(dim=1, descending=True, stable=True)
    allowed_first = (~is_allowed.gather(1, order)).int().argsort(dim=1, stable=True)
    return order.gather(1, allowed_first)[:, :topk]
