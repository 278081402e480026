"""What group_advantage means: two passes of segment sums in float64."""

from __future__ import annotations

import torch


def group_advantage_reference(
    rewards: torch.Tensor, group_ids: torch.Tensor, divide_by_std: bool, ddof: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rewards [N], group_ids [N]) -> (advantage, mean, std, is_active), each [N]."""
    if not rewards.numel():
        empty = rewards.new_empty(0, dtype=torch.float32)
        return empty, empty, empty, empty.bool()
    r = rewards.double()
    groups = int(group_ids.max()) + 1

    def group_sum(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(groups).index_add_(0, group_ids, x)

    count = group_sum(torch.ones_like(r))
    mean = (group_sum(r) / count)[group_ids]
    high = r.new_full((groups,), -torch.inf).scatter_reduce_(0, group_ids, r, "amax")
    low = r.new_full((groups,), torch.inf).scatter_reduce_(0, group_ids, r, "amin")
    is_active = (high > low)[group_ids]  # decided on the rewards themselves: a rounded mean leaves a tiny std
    centered = torch.where(is_active, r - mean, 0.0)
    std = (group_sum(centered * centered) / (count - ddof).clamp(min=1)).sqrt()[group_ids]
    advantage = centered / torch.where(is_active, std, 1.0) if divide_by_std else centered
    return advantage.float(), mean.float(), std.float(), is_active
