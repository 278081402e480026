"""Launches csrc/moe_plan.cu."""

from __future__ import annotations

import torch

from r1kernels import cuda_lib

CHOICES = 1024  # of a block of threads, as in csrc/moe_plan.cu


def plan(
    ids: torch.Tensor, num_experts: int, align: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T, K] -> (row_of [T, K], slot_of [R], expert_of [R], offsets [E + 1], counts [E])."""
    row_of = torch.empty_like(ids)
    slot_of, expert_of = ids.new_empty(num_rows), ids.new_empty(num_rows)
    if not ids.numel():
        return row_of, slot_of, expert_of, ids.new_zeros(num_experts + 1), ids.new_zeros(num_experts)
    offsets, counts = ids.new_empty(num_experts + 1), ids.new_empty(num_experts)
    workspace = ids.new_empty(-(-ids.numel() // CHOICES) * num_experts)
    cuda_lib.launch(
        "r1_moe_plan",
        *(ids, workspace, row_of, slot_of, expert_of, offsets, counts),
        *(ids.numel(), num_experts, align, num_rows),
    )
    return row_of, slot_of, expert_of, offsets, counts
