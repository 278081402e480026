"""torch.ops.r1kernels.moe_combine and moe_combine_backward_quant: what graphs and fake tensors see of the ops."""

from __future__ import annotations

import torch

from r1kernels.moe_combine import combine_backward, moe_combine, moe_combine_backward_quant
from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_permute_quant.torch_op import empty_fp8_rows, fp8_fields, rows_of
from r1kernels.moe_plan import RowPlan
from r1kernels.moe_plan.torch_op import filled, plan_of, tensors_of
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::moe_combine", mutates_args=())
def combine(
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    residual: torch.Tensor | None,
    plan: list[torch.Tensor],
    align: int,
    impl: str | None,
) -> torch.Tensor:
    """As moe_combine."""
    return moe_combine(rows, plan_of(plan, align), weights, residual=residual, impl=wish(impl))


@combine.register_fake
def _(rows, weights, residual, plan, align, impl):
    return rows.new_empty(plan[0].shape[0], rows.shape[1])


@torch.library.custom_op("r1kernels::moe_combine_backward", mutates_args=())
def gradients(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    weights: torch.Tensor | None,
    plan: list[torch.Tensor],
    align: int,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and weights, the second empty where no rows are given."""
    to_rows, to_weights = combine_backward(grad, rows, plan_of(plan, align), weights, wish(impl))
    return to_rows, filled(to_weights, grad if weights is None else weights)


@gradients.register_fake
def _(grad, rows, weights, plan, align, impl):
    like = grad if weights is None else weights
    return grad.new_empty(plan[1].shape[0], grad.shape[1]), like.new_empty(0 if rows is None else like.shape)


def _setup(ctx, inputs, output):
    rows, weights, _, plan, ctx.align, ctx.impl = inputs
    ctx.save_for_backward(rows, weights, *plan)


def _backward(ctx, grad):
    rows, weights, *plan = ctx.saved_tensors
    _, needs_weights, needs_residual, *_ = ctx.needs_input_grad
    given = rows if needs_weights else None
    to_rows, to_weights = gradients(grad.contiguous(), given, weights, plan, ctx.align, ctx.impl)
    to_weights, to_residual = to_weights if needs_weights else None, grad if needs_residual else None
    return to_rows, to_weights, to_residual, [None] * 5, None, None


combine.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("r1kernels::moe_combine_backward_quant", mutates_args=())
def gradients_quant(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    weights: torch.Tensor,
    plan: list[torch.Tensor],
    align: int,
    dual: bool,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Fp8Rows, and the gradient of the weights, empty where no rows are given."""
    given = plan_of(plan, align)
    quantized, to_weights = moe_combine_backward_quant(grad, rows, given, weights, dual=dual, impl=wish(impl))
    return *fp8_fields(quantized), filled(to_weights, weights)


@gradients_quant.register_fake
def _(grad, rows, weights, plan, align, dual, impl):
    quantized = empty_fp8_rows(grad, plan[1].shape[0], grad.shape[1], dual)
    return *quantized, weights.new_empty(0 if rows is None else weights.shape)


def traced_quant(
    grad: torch.Tensor, rows: torch.Tensor | None, plan: RowPlan, weights: torch.Tensor, dual: bool, impl: str | None
) -> tuple[Fp8Rows, torch.Tensor | None]:
    """`moe_combine_backward_quant` as one node of a graph."""
    given = grad.detach(), None if rows is None else rows.detach(), weights.detach()
    *quantized, to_weights = gradients_quant(*given, tensors_of(plan), plan.align, dual, impl)
    return rows_of(tuple(quantized), dual), None if rows is None else to_weights
