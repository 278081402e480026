"""What moe_plan means: a stable sort by expert."""

from __future__ import annotations

import torch


def plan(
    ids: torch.Tensor, num_experts: int, align: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T, K] -> (row_of [T, K], slot_of [R], expert_of [R], offsets [E + 1], counts [E])."""
    flat = ids.flatten().long()
    # Choices of -1 and, below, padding rows are written to one place past the end that is cut off again.
    nowhere = torch.where(flat < 0, num_experts, flat)
    counts = flat.new_zeros(num_experts + 1).index_add_(0, nowhere, torch.ones_like(flat))[:num_experts]
    padded = (counts + align - 1) // align * align
    offsets = torch.cat([counts.new_zeros(1), padded.cumsum(0)])
    order = torch.argsort(nowhere, stable=True)
    expert = nowhere[order]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # of each expert in the sorted order
    place = torch.arange(flat.numel(), device=ids.device) - starts[expert]
    row = torch.where(expert < num_experts, offsets[expert] + place, num_rows)
    slot_of = flat.new_full((num_rows + 1,), -1).index_copy_(0, row, order)
    expert_of = flat.new_full((num_rows + 1,), -1).index_copy_(0, row, expert)
    row_of = torch.empty_like(flat).index_copy_(0, order, torch.where(expert < num_experts, row, -1))
    return (
        row_of.view(ids.shape).int(),
        slot_of[:num_rows].int(),
        expert_of[:num_rows].int(),
        offsets.int(),
        counts.int(),
    )
