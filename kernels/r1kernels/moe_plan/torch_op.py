"""torch.ops.r1kernels.moe_plan, and how a RowPlan passes through the ops of the experts in a graph."""

from __future__ import annotations

import torch

from r1kernels.moe_plan import RowPlan, max_rows, moe_plan
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::moe_plan", mutates_args=())
def plan_tensors(
    ids: torch.Tensor, num_experts: int, align: int, num_choices: int | None, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of a RowPlan."""
    plan = moe_plan(ids, num_experts, align=align, num_choices=num_choices, impl=wish(impl))
    row_of, slot_of, expert_of, offsets, counts = tensors_of(plan)
    return row_of, slot_of, expert_of, offsets, counts


@plan_tensors.register_fake
def _(ids, num_experts, align, num_choices, impl):
    return tuple(empty_plan(ids, num_experts, align, num_choices))


def traced(ids: torch.Tensor, num_experts: int, align: int, num_choices: int | None, impl: str | None) -> RowPlan:
    """`moe_plan` as one node of a graph."""
    return plan_of(list(plan_tensors(ids, num_experts, align, num_choices, impl)), align)


def tensors_of(plan: RowPlan) -> list[torch.Tensor]:
    """What an op can be told of a plan, beside its `align`."""
    return [plan.row_of, plan.slot_of, plan.expert_of, plan.offsets, plan.counts]


def plan_of(tensors: list[torch.Tensor], align: int) -> RowPlan:
    """The plan of `tensors_of` again."""
    row_of, slot_of, expert_of, offsets, counts = tensors
    return RowPlan(row_of=row_of, slot_of=slot_of, expert_of=expert_of, offsets=offsets, counts=counts, align=align)


def empty_plan(ids: torch.Tensor, num_experts: int, align: int, num_choices: int | None = None) -> list[torch.Tensor]:
    """`tensors_of` the plan of these ids, without values."""
    rows = max_rows(ids.numel() if num_choices is None else num_choices, num_experts, align)
    return [ids.new_empty(shape) for shape in (ids.shape, (rows,), (rows,), (num_experts + 1,), (num_experts,))]


def filled(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """An op returns no None: an empty tensor of like's dtype stands for it."""
    return like.new_empty(0) if tensor is None else tensor
