"""torch.ops.r1kernels.moe_permute, moe_permute_quant and moe_permute_fp8, and how FP8 rows pass through an op."""

from __future__ import annotations

import torch

from r1kernels.moe_permute_quant import Fp8Rows, moe_permute, moe_permute_fp8, moe_permute_quant
from r1kernels.moe_plan import RowPlan
from r1kernels.moe_plan.torch_op import filled, plan_of, tensors_of
from r1kernels.tracing import wish

Fp8Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("r1kernels::moe_permute", mutates_args=())
def permute(x: torch.Tensor, plan: list[torch.Tensor], align: int, impl: str | None) -> torch.Tensor:
    """As moe_permute."""
    return moe_permute(x, plan_of(plan, align), impl=wish(impl))


@permute.register_fake
def _(x, plan, align, impl):
    return x.new_empty(plan[1].shape[0], x.shape[1])


def _setup(ctx, inputs, output):
    _, plan, ctx.align, ctx.impl = inputs
    ctx.save_for_backward(*plan)


def _backward(ctx, grad):
    plan = list(ctx.saved_tensors)
    combine = torch.ops.r1kernels.moe_combine.default
    return combine(grad.contiguous(), None, None, plan, ctx.align, ctx.impl), [None] * 5, None, None


permute.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("r1kernels::moe_permute_quant", mutates_args=())
def permute_quant(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    plan: list[torch.Tensor],
    align: int,
    dual: bool,
    impl: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of Fp8Rows; the last two are empty without `dual`."""
    return fp8_fields(moe_permute_quant(x, plan_of(plan, align), weights=weights, dual=dual, impl=wish(impl)))


@permute_quant.register_fake
def _(x, weights, plan, align, dual, impl):
    return empty_fp8_rows(x, plan[1].shape[0], x.shape[1], dual)


@torch.library.custom_op("r1kernels::moe_permute_fp8", mutates_args=())
def permute_fp8(
    values: torch.Tensor, scale: torch.Tensor, plan: list[torch.Tensor], align: int, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two fields of Fp8Rows."""
    return moe_permute_fp8(values, scale, plan_of(plan, align), impl=wish(impl))[:2]


@permute_fp8.register_fake
def _(values, scale, plan, align, impl):
    return empty_fp8_rows(scale, plan[1].shape[0], values.shape[1], False)[:2]


def traced_quant(x: torch.Tensor, weights: torch.Tensor | None, plan: RowPlan, dual: bool, impl: str | None) -> Fp8Rows:
    """`moe_permute_quant` as one node of a graph."""
    weights = None if weights is None else weights.detach()
    return rows_of(permute_quant(x.detach(), weights, tensors_of(plan), plan.align, dual, impl), dual)


def fp8_fields(rows: Fp8Rows) -> Fp8Fields:
    """What an op can return of FP8 rows: without `dual` the last two are empty."""
    values, scale, values_t, scale_t = rows
    return values, scale, filled(values_t, values), filled(scale_t, scale)


def empty_fp8_rows(x: torch.Tensor, rows: int, columns: int, dual: bool) -> Fp8Fields:
    """`fp8_fields` of [rows, columns] beside x, without values."""
    values = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(columns // 128, rows, dtype=torch.float32).t()
    if not dual:
        return values, scale, values.new_empty(0), scale.new_empty(0)
    return values, scale, values.new_empty(rows * columns), scale.new_empty(rows // 128, columns)


def rows_of(fields: Fp8Fields, dual: bool) -> Fp8Rows:
    """The rows of `fp8_fields` again."""
    return Fp8Rows(*fields) if dual else Fp8Rows(*fields[:2], None, None)
