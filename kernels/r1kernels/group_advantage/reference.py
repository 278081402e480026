"""What group_advantage means: two passes of segment sums in float64."""

from __future__ import annotations

import torch


def group_advantage_reference(
    rewards: torch.Tensor,
    group_ids: torch.Tensor | None,
    cu_groups: torch.Tensor | None,
    *,
    mode: str,
    ddof: int,
    eps: float,
    clamps: bool,
    raw: bool,
    skips: bool,
    rounding: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (advantage, mean, std, is_active), each [N].

    `skips`: rewards that are not finite count nowhere. `rounding`: spread of equal rewards, relative to the largest.
    """
    if not rewards.numel():
        empty = rewards.new_empty(0, dtype=torch.float32)
        return empty, empty, empty, empty.bool()
    if cu_groups is not None:
        sizes = cu_groups.diff().long()
        numbers = torch.arange(len(sizes), device=rewards.device)
        group_ids = torch.repeat_interleave(numbers, sizes, output_size=len(rewards))
    else:
        group_ids = torch.unique(group_ids, return_inverse=True)[1]
    groups = int(group_ids[-1]) + 1 if cu_groups is not None else int(group_ids.max()) + 1
    is_counted = rewards.isfinite() if skips else torch.ones_like(rewards, dtype=torch.bool)
    r = torch.where(is_counted, rewards.double(), 0.0)

    def group_sum(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(groups).index_add_(0, group_ids, x)

    def group_end(fill: float, reduce: str) -> torch.Tensor:
        x = torch.where(is_counted, r, fill)
        return r.new_full((groups,), fill).scatter_reduce_(0, group_ids, x, reduce)

    count = group_sum(is_counted.double())[group_ids]
    mean = group_sum(r)[group_ids] / count.clamp(min=1)
    # Decided on the rewards themselves: a rounded mean leaves a tiny std. NaN and inf are not equal to anything.
    high, low = group_end(-torch.inf, "amax"), group_end(torch.inf, "amin")
    is_equal = _is_equal(high, low, rounding)[group_ids] | (count == 0)
    centered = torch.where(is_counted & ~is_equal, r - mean, 0.0)
    std = (group_sum(centered * centered)[group_ids] / (count - ddof).clamp(min=1)).sqrt()
    if mode == "batch_std":
        total = is_counted.sum()
        high, low = torch.where(is_counted, r, -torch.inf).max(), torch.where(is_counted, r, torch.inf).min()
        is_spread = is_counted & ~_is_equal(high, low, rounding)
        deviation = torch.where(is_spread, r - r.sum() / total.clamp(min=1), 0.0)
        std = (deviation.square().sum() / (total - ddof).clamp(min=1)).sqrt().expand_as(r)
    scale = std.clamp(min=eps) if clamps else std + eps
    if mode in ("mean", "rloo"):
        scale = torch.ones_like(r)
    is_single = is_counted & (count == 1)
    if raw:
        alone = torch.ones_like(r) * (max(1.0, eps) if clamps else 1.0 + eps) if mode == "mean_std" else scale
        centered, scale = torch.where(is_single, r, centered), torch.where(is_single, alone, scale)
    if mode == "rloo":
        others = count / (count - 1).clamp(min=1)
        centered = torch.where(is_single, centered, centered * others)
    advantage = torch.where(centered == 0, 0.0, centered / scale)
    return advantage.float(), mean.float(), std.float(), ~is_equal


def _is_equal(high: torch.Tensor, low: torch.Tensor, rounding: float) -> torch.Tensor:
    """Whether rewards between `low` and `high` differ by no more than their rounding."""
    spread = high - low
    return (spread <= rounding * torch.maximum(high.abs(), low.abs())) & spread.isfinite()
