"""torch.ops.r1kernels.moe_swiglu, moe_swiglu_quant and moe_swiglu_quant_backward: what graphs see of the ops."""

from __future__ import annotations

import torch

from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_permute_quant.torch_op import empty_fp8_rows, fp8_fields, rows_of
from r1kernels.moe_plan import RowPlan
from r1kernels.moe_plan.torch_op import filled, plan_of, tensors_of
from r1kernels.moe_swiglu_quant import (
    SwigluGrad,
    moe_swiglu,
    moe_swiglu_quant,
    moe_swiglu_quant_backward,
    swiglu_backward,
)
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::moe_swiglu", mutates_args=())
def swiglu(
    h: torch.Tensor, weights: torch.Tensor | None, plan: list[torch.Tensor], align: int, impl: str | None
) -> torch.Tensor:
    """As moe_swiglu."""
    return moe_swiglu(h, plan_of(plan, align), weights, impl=wish(impl))


@swiglu.register_fake
def _(h, weights, plan, align, impl):
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@torch.library.custom_op("r1kernels::moe_swiglu_backward", mutates_args=())
def gradients(
    grad: torch.Tensor,
    h: torch.Tensor,
    weights: torch.Tensor | None,
    plan: list[torch.Tensor],
    align: int,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h and weights, the second empty without weights."""
    to_h, _, to_weights = swiglu_backward(grad, h, plan_of(plan, align), weights, wish(impl))
    return to_h, filled(to_weights, h)


@gradients.register_fake
def _(grad, h, weights, plan, align, impl):
    return torch.empty_like(h), h.new_empty(0) if weights is None else torch.empty_like(weights)


def _setup(ctx, inputs, output):
    h, weights, plan, ctx.align, ctx.impl = inputs
    ctx.save_for_backward(h, weights, *plan)


def _backward(ctx, grad):
    h, weights, *plan = ctx.saved_tensors
    to_h, to_weights = gradients(grad.contiguous(), h, weights, plan, ctx.align, ctx.impl)
    return to_h, None if weights is None else to_weights, [None] * 5, None, None


swiglu.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("r1kernels::moe_swiglu_quant", mutates_args=())
def swiglu_quant(
    h: torch.Tensor, weights: torch.Tensor | None, plan: list[torch.Tensor], align: int, dual: bool, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Fp8Rows; the last two are empty without `dual`."""
    return fp8_fields(moe_swiglu_quant(h, plan_of(plan, align), weights=weights, dual=dual, impl=wish(impl)))


@swiglu_quant.register_fake
def _(h, weights, plan, align, dual, impl):
    return empty_fp8_rows(h, h.shape[0], h.shape[1] // 2, dual)


@torch.library.custom_op("r1kernels::moe_swiglu_quant_backward", mutates_args=())
def gradients_quant(
    grad: torch.Tensor,
    h: torch.Tensor,
    weights: torch.Tensor | None,
    plan: list[torch.Tensor],
    align: int,
    dual: bool,
    impl: str | None,
) -> list[torch.Tensor]:
    """The fields of Fp8Rows, then the others of SwigluGrad: nine, empty where they are None."""
    given = plan_of(plan, align)
    quantized, *rest = moe_swiglu_quant_backward(grad, h, given, weights=weights, dual=dual, impl=wish(impl))
    wide = h.new_empty(0, dtype=torch.bfloat16)
    like = (wide, wide, quantized.values, quantized.scale, quantized.scale)
    return [*fp8_fields(quantized), *(filled(x, y) for x, y in zip(rest, like, strict=True))]


@gradients_quant.register_fake
def _(grad, h, weights, plan, align, dual, impl):
    quantized = empty_fp8_rows(h, h.shape[0], h.shape[1], dual)
    of_act = empty_fp8_rows(h, grad.shape[0], grad.shape[1], dual)[2:]
    wide = [h.new_empty(0 if dual else x.shape, dtype=torch.bfloat16) for x in (h, grad)]
    return [*quantized, *wide, *of_act, quantized[1].new_empty(0) if weights is None else torch.empty_like(weights)]


def traced_quant(h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool, impl: str | None) -> Fp8Rows:
    """`moe_swiglu_quant` as one node of a graph."""
    weights = None if weights is None else weights.detach()
    return rows_of(swiglu_quant(h.detach(), weights, tensors_of(plan), plan.align, dual, impl), dual)


def traced_quant_backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool, impl: str | None
) -> SwigluGrad:
    """`moe_swiglu_quant_backward` as one node of a graph."""
    given = grad.detach(), h.detach(), None if weights is None else weights.detach()
    found = gradients_quant(*given, tensors_of(plan), plan.align, dual, impl)
    values, scale, values_t, scale_t, wide_grad, wide_act, act_t, act_scale_t, to_weights = found
    to_weights = None if weights is None else to_weights
    quantized = rows_of((values, scale, values_t, scale_t), dual)
    if dual:
        return SwigluGrad(quantized, None, None, act_t, act_scale_t, to_weights)
    return SwigluGrad(quantized, wide_grad, wide_act, None, None, to_weights)
