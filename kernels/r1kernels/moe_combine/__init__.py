"""The experts' rows back to their tokens: a weighted sum in a fixed order."""

from __future__ import annotations

from typing import Any

import torch

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.moe_permute_quant import Fp8Rows, check_fp8_rows, implementations
from r1kernels.moe_plan import RowPlan, check_device, check_plan, check_weights
from r1kernels.tracing import is_traced


def moe_combine(
    rows: torch.Tensor,
    plan: RowPlan,
    weights: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Sum the rows of each token: out[t] = sum over k of weights[t, k] * rows[row_of[t, k]] (+ residual[t]).

    In float32, k = 0, 1, ... and the residual last, rounded once: bitwise the same in every run. Choices of -1 add
    nothing. Differentiable in rows, weights and residual; the backward computes d(weights) in the same read of the
    gradient as d(rows), whose padding between experts is zero (rows from plan.offsets[E] on hold anything).

    Args:
        rows:     [R, H] floating point, contiguous, in expert order.
        plan:     of `moe_plan`.
        weights:  [T, K] float32; None is all ones.
        residual: [T, H] as rows, what to add (the shared expert's output).
        impl:     force an implementation; None picks one by device and dtype (the CUDA kernels take bfloat16 with H
                  divisible by 8).

    Returns:
        [T, H] in the rows' dtype.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0, 1]], dtype=torch.int32), 2, align=1)
        >>> moe_combine(torch.tensor([[1.0], [10.0]]), plan, torch.tensor([[0.5, 0.25]]))
        tensor([[3.]])
    """
    op = "moe_combine"
    _check_rows(op, rows, plan)
    check_weights(op, plan, weights)
    if residual is not None and (
        residual.shape != (plan.num_tokens, rows.shape[1])
        or residual.dtype != rows.dtype
        or not residual.is_contiguous()
    ):
        raise ValueError(
            f"{op}: residual must be contiguous {rows.dtype} {(plan.num_tokens, rows.shape[1])}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    check_device(op, plan, residual=residual)
    if is_traced(rows):
        from r1kernels.moe_combine import torch_op
        from r1kernels.moe_plan.torch_op import tensors_of

        return torch_op.combine(rows, weights, residual, tensors_of(plan), plan.align, impl)
    return _Combine.apply(rows, weights, residual, plan, choose(op, impl, rows, have=implementations(rows, columns=8)))


def moe_combine_backward_quant(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    plan: RowPlan,
    weights: torch.Tensor,
    *,
    dual: bool = False,
    impl: Impl | None = None,
) -> tuple[Fp8Rows, torch.Tensor | None]:
    """The backward of `moe_combine` with d(rows) in FP8: the gradient of the token times its weight, quantized.

    Row (t, k) of d(rows) is weights[t, k] * grad[t] as `moe_permute_quant` with weights gives it, and
    d(weights)[t, k] = dot(grad[t], rows[row_of[t, k]]) in float32, from the same read of grad.

    Args:
        grad:    [T, H] bfloat16 or float32, contiguous, H divisible by 128: gradient of the combined tokens.
        rows:    [R, H] as grad, the combined rows; None when d(weights) is not wanted.
        plan:    of `moe_plan`.
        weights: [T, K] float32.
        dual:    as in `moe_permute_quant`.
        impl:    force an implementation; None picks one by device and dtype (the CUDA kernels take bfloat16).

    Returns:
        (Fp8Rows of d(rows), d(weights) [T, K] float32 or None).

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0, 1]], dtype=torch.int32), 2, align=1)
        >>> rows, to_weights = moe_combine_backward_quant(
        ...     torch.ones(1, 128), torch.full((2, 128), 2.0), plan, torch.tensor([[0.5, 0.25]])
        ... )
        >>> rows.values.float()[:, 0] * rows.scale[:, 0], to_weights
        (tensor([0.5000, 0.2500]), tensor([[256., 256.]]))
    """
    op = "moe_combine_backward_quant"
    if grad.dim() != 2 or not grad.is_contiguous():
        raise ValueError(f"{op}: grad must be contiguous [T, H], got {tuple(grad.shape)} stride {grad.stride()}")
    check_plan(op, plan, num_tokens=grad.shape[0])
    check_weights(op, plan, weights)
    check_fp8_rows(op, "grad", grad, plan, dual)
    if rows is not None:
        _check_rows(op, rows, plan)
        if rows.shape[1] != grad.shape[1] or rows.dtype != grad.dtype:
            raise ValueError(
                f"{op}: rows must be {grad.dtype} [R, {grad.shape[1]}] as grad, got {rows.dtype} {tuple(rows.shape)}"
            )
    if is_traced(grad):
        from r1kernels.moe_combine.torch_op import traced_quant

        return traced_quant(grad, rows, plan, weights, dual, impl)
    if choose(op, impl, grad, have=implementations(grad)) == "cuda":
        from r1kernels.moe_combine.cuda_impl import combine_backward_quant
    else:
        from r1kernels.moe_combine.reference import combine_backward_quant
    quantized, grad_weights = combine_backward_quant(grad, rows, plan, weights, dual)
    return Fp8Rows(*quantized), grad_weights


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        residual: torch.Tensor | None,
        plan: RowPlan,
        impl: str,
    ) -> torch.Tensor:
        ctx.plan, ctx.impl = plan, impl
        needs_rows = weights is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if needs_rows else None, weights)
        if impl == "cuda":
            from r1kernels.moe_combine.cuda_impl import combine
        else:
            from r1kernels.moe_combine.reference import combine
        return combine(rows, plan, weights, residual)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        rows, weights = ctx.saved_tensors
        grad_rows, grad_weights = combine_backward(grad.contiguous(), rows, ctx.plan, weights, ctx.impl)
        return grad_rows, grad_weights, grad if ctx.needs_input_grad[2] else None, None, None


def combine_backward(
    grad: torch.Tensor,
    rows: torch.Tensor | None,
    plan: RowPlan,
    weights: torch.Tensor | None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(d(rows) [R, H], d(weights) [T, K] or None without rows) of `moe_combine` from grad [T, H]."""
    if choose("moe_combine", impl, grad, have=implementations(grad, columns=8)) == "cuda":
        from r1kernels.moe_combine.cuda_impl import combine_backward as backward
    else:
        from r1kernels.moe_combine.reference import combine_backward as backward
    return backward(grad, rows, plan, weights)


def _check_rows(op: str, rows: torch.Tensor, plan: RowPlan) -> None:
    check_float(op, "rows", rows)
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"{op}: rows must be contiguous [R, H], got shape {tuple(rows.shape)} stride {rows.stride()}")
    check_plan(op, plan, num_rows=rows.shape[0])
    if rows.device != plan.row_of.device:
        raise ValueError(f"{op}: rows are on {rows.device}, but the plan is on {plan.row_of.device}")
