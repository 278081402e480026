"""torch.ops.r1kernels.moe_grouped_gemm, moe_grouped_wgrad and their FP8 forms: what graphs see of the ops."""

from __future__ import annotations

import torch

from r1kernels.fp8_cast import Fp8
from r1kernels.moe_grouped_gemm import (
    TransposedRows,
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad,
    moe_grouped_wgrad_fp8,
)
from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_plan import RowPlan
from r1kernels.moe_plan.torch_op import plan_of, tensors_of
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::moe_grouped_gemm", mutates_args=())
def gemm(rows: torch.Tensor, weight: torch.Tensor, plan: list[torch.Tensor], align: int) -> torch.Tensor:
    """As moe_grouped_gemm."""
    return moe_grouped_gemm(rows, weight, plan_of(plan, align))


@gemm.register_fake
def _(rows, weight, plan, align):
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("r1kernels::moe_grouped_wgrad", mutates_args=())
def wgrad(grad: torch.Tensor, rows: torch.Tensor, plan: list[torch.Tensor], align: int) -> torch.Tensor:
    """As moe_grouped_wgrad."""
    return moe_grouped_wgrad(grad, rows, plan_of(plan, align))


@wgrad.register_fake
def _(grad, rows, plan, align):
    return grad.new_empty(plan[4].shape[0], grad.shape[1], rows.shape[1])


def _setup(ctx, inputs, output):
    rows, weight, plan, ctx.align = inputs
    ctx.save_for_backward(rows, weight, *plan)


def _backward(ctx, grad):
    rows, weight, *plan = ctx.saved_tensors
    needs_rows, needs_weight, *_ = ctx.needs_input_grad
    grad = grad.contiguous()
    to_rows = gemm(grad, weight.mT, plan, ctx.align) if needs_rows else None
    to_weight = wgrad(grad, rows, plan, ctx.align) if needs_weight else None
    return to_rows, to_weight, [None] * 5, None


gemm.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("r1kernels::moe_grouped_gemm_fp8", mutates_args=())
def gemm_fp8(
    values: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    plan: list[torch.Tensor],
    align: int,
    impl: str | None,
) -> torch.Tensor:
    """As moe_grouped_gemm_fp8."""
    rows = Fp8Rows(values, scale, None, None)
    return moe_grouped_gemm_fp8(rows, Fp8(weight, weight_scale), plan_of(plan, align), impl=wish(impl))


@gemm_fp8.register_fake
def _(values, scale, weight, weight_scale, plan, align, impl):
    return values.new_empty(values.shape[0], weight.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("r1kernels::moe_grouped_wgrad_fp8", mutates_args=())
def wgrad_fp8(
    grad: torch.Tensor,
    grad_scale: torch.Tensor,
    rows: torch.Tensor,
    rows_scale: torch.Tensor,
    plan: list[torch.Tensor],
    align: int,
    rows_per_expert: list[int] | None,
    impl: str | None,
) -> torch.Tensor:
    """As moe_grouped_wgrad_fp8, from zero."""
    transposed = (grad, grad_scale), (rows, rows_scale)
    given = plan_of(plan, align)
    return moe_grouped_wgrad_fp8(*transposed, given, rows_per_expert=rows_per_expert, impl=wish(impl))


@wgrad_fp8.register_fake
def _(grad, grad_scale, rows, rows_scale, plan, *rest):
    return grad_scale.new_empty(plan[4].shape[0], grad_scale.shape[1], rows_scale.shape[1])


def traced_wgrad_fp8(
    grad_t: TransposedRows,
    rows_t: TransposedRows,
    plan: RowPlan,
    out: torch.Tensor | None,
    rows_per_expert: list[int] | None,
    impl: str | None,
) -> torch.Tensor:
    """`moe_grouped_wgrad_fp8` as one node of a graph, and the sum with `out` as another."""
    found = wgrad_fp8(*grad_t, *rows_t, tensors_of(plan), plan.align, rows_per_expert, impl)
    return found if out is None else out.add_(found)
