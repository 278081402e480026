"""The gated activation of the experts over rows in expert order, quantized to FP8 in the same read; both directions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_plan import RowPlan, check_plan, check_weights
from r1kernels.tracing import is_traced

BLOCK = 128


class SwigluGrad(NamedTuple):
    """What `moe_swiglu_quant_backward` returns. The wide pair is given without `dual`, the transposed ones with it."""

    grad: Fp8Rows  # d(h), [R, 2I]
    wide_grad: torch.Tensor | None  # [R, 2I] bfloat16, d(h)
    wide_act: torch.Tensor | None  # [R, I] bfloat16, the forward result
    act_t: torch.Tensor | None  # [R * I] float8_e4m3fn, the forward result as Fp8Rows.values_t
    act_scale_t: torch.Tensor | None  # [R / 128, I] float32
    grad_weights: torch.Tensor | None  # [T, K] float32; None without weights


def moe_swiglu(
    h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None = None, *, impl: Impl | None = None
) -> torch.Tensor:
    """silu(gate) * up * weight of the row, with h = [gate, up]; differentiable in h and weights.

    The routing weight is applied here, before the down projection: that is linear, so the layer is the same, and the
    gradient of the weight needs nothing but what this read has at hand (no rows of the expert's output are kept).

    Args:
        h:       [R, 2I] floating point, contiguous, rows in expert order: gate columns before up columns.
        plan:    of `moe_plan`.
        weights: [T, K] float32, of each choice; None is all ones.
        impl:    force an implementation; None picks one by device.

    Returns:
        [R, I] in h's dtype, computed in float32 and rounded once. Padding between experts is zero; rows from
        plan.offsets[E] on hold anything.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0], [0]], dtype=torch.int32), 1, align=1)
        >>> moe_swiglu(torch.tensor([[1.0, 2.0], [-1.0, 2.0]]), plan)
        tensor([[ 1.4621],
                [-0.5379]])
    """
    op = "moe_swiglu"
    _check_rows(op, "h", h, plan)
    check_weights(op, plan, weights)
    if is_traced(h):
        from r1kernels.moe_plan.torch_op import tensors_of
        from r1kernels.moe_swiglu_quant import torch_op

        return torch_op.swiglu(h, weights, tensors_of(plan), plan.align, impl)
    return _Swiglu.apply(h, weights, plan, choose(op, impl, h, have=_implementations(h)))


def moe_swiglu_quant(
    h: torch.Tensor,
    plan: RowPlan,
    *,
    weights: torch.Tensor | None = None,
    dual: bool = False,
    impl: Impl | None = None,
) -> Fp8Rows:
    """`moe_swiglu` in FP8: blocks, scales and rounding are those of `fp8_quantize`, taken from the float32 result.

    In 1x128 blocks the weight goes to the scale, so that it costs no rounding. Not differentiable:
    `moe_swiglu_quant_backward` is the other half.

    Args:
        h:       [R, 2I] bfloat16 or float32, contiguous, I divisible by 128.
        plan:    of `moe_plan`.
        weights: [T, K] float32; None is all ones.
        dual:    also give the transposed form in 128x1 blocks; needs plan.align == 128.
        impl:    force an implementation; None picks one by device.

    Returns:
        Fp8Rows [R, I]; its last two are None without `dual`. Rows from plan.offsets[E] on hold anything in all four.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0]], dtype=torch.int32), 1, align=1)
        >>> rows = moe_swiglu_quant(torch.ones(1, 256), plan)
        >>> rows.values.float()[0, 0] * rows.scale[0, 0]
        tensor(0.7311)
    """
    op = "moe_swiglu_quant"
    _check_quantizable(op, h, plan, dual)
    check_weights(op, plan, weights)
    if is_traced(h):
        from r1kernels.moe_swiglu_quant.torch_op import traced_quant

        return traced_quant(h, plan, weights, dual, impl)
    if choose(op, impl, h, have=_implementations(h)) == "triton":
        from r1kernels.moe_swiglu_quant.triton_impl import swiglu_quant
    else:
        from r1kernels.moe_swiglu_quant.reference import swiglu_quant
    return Fp8Rows(*swiglu_quant(h, plan, weights, dual))


def moe_swiglu_quant_backward(
    grad: torch.Tensor,
    h: torch.Tensor,
    plan: RowPlan,
    *,
    weights: torch.Tensor | None = None,
    dual: bool = False,
    impl: Impl | None = None,
) -> SwigluGrad:
    """The backward of `moe_swiglu`, and the forward again, from one read of h and grad.

        s      = sigmoid(gate)
        act    = weight * gate * s * up
        d gate = weight * grad * up * s * (1 + gate * (1 - s))
        d up   = weight * grad * gate * s
        d weight of a row = sum over its columns of grad * gate * s * up

    d(h) comes in FP8 for the gradient of the layer's input. The gradients of the weight matrices read d(h) and act
    either in bfloat16 or, with `dual`, transposed in FP8: no second pass quantizes or transposes.

    Args:
        grad:    [R, I] as h, gradient of the result.
        h:       [R, 2I] bfloat16 or float32, contiguous, I divisible by 128.
        plan:    of `moe_plan`.
        weights: [T, K] float32; None is all ones.
        dual:    as above; needs plan.align == 128.
        impl:    force an implementation; None picks one by device.

    Returns:
        SwigluGrad. Padding between experts is zero in the wide and the transposed forms; rows from plan.offsets[E] on
        hold anything.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0]], dtype=torch.int32), 1, align=1)
        >>> found = moe_swiglu_quant_backward(torch.ones(1, 128), torch.ones(1, 256), plan)
        >>> found.wide_grad[0, [0, 128]], found.wide_act[0, 0]
        (tensor([0.9258, 0.7305], dtype=torch.bfloat16), tensor(0.7305, dtype=torch.bfloat16))
    """
    op = "moe_swiglu_quant_backward"
    _check_quantizable(op, h, plan, dual)
    _check_grad(op, grad, h)
    check_weights(op, plan, weights)
    if is_traced(h):
        from r1kernels.moe_swiglu_quant.torch_op import traced_quant_backward

        return traced_quant_backward(grad, h, plan, weights, dual, impl)
    if choose(op, impl, h, have=_implementations(h)) == "triton":
        from r1kernels.moe_swiglu_quant.triton_impl import swiglu_quant_backward
    else:
        from r1kernels.moe_swiglu_quant.reference import swiglu_quant_backward
    quantized, *rest = swiglu_quant_backward(grad, h, plan, weights, dual)
    return SwigluGrad(Fp8Rows(*quantized), *rest)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weights: torch.Tensor | None,
        plan: RowPlan,
        impl: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(h, weights)
        ctx.plan, ctx.impl = plan, impl
        if impl == "triton":
            from r1kernels.moe_swiglu_quant.triton_impl import swiglu
        else:
            from r1kernels.moe_swiglu_quant.reference import swiglu
        return swiglu(h, plan, weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        h, weights = ctx.saved_tensors
        grad_h, _, grad_weights = swiglu_backward(grad.contiguous(), h, ctx.plan, weights, ctx.impl)
        return grad_h, grad_weights, None, None


def swiglu_backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, impl: Impl | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(d(h) [R, 2I], the forward result again [R, I], d(weights) [T, K]) of `moe_swiglu`, from one read."""
    op = "moe_swiglu"
    _check_grad(op, grad, h)
    if choose(op, impl, h, have=_implementations(h)) == "triton":
        from r1kernels.moe_swiglu_quant.triton_impl import swiglu_backward as backward
    else:
        from r1kernels.moe_swiglu_quant.reference import swiglu_backward as backward
    return backward(grad, h, plan, weights)


def _implementations(h: torch.Tensor) -> tuple[str, ...]:
    """The Triton kernels take columns in blocks of 128, in bfloat16 or float32."""
    is_fit = h.dtype in (torch.bfloat16, torch.float32) and h.shape[1] % (2 * BLOCK) == 0
    return ("triton", "reference") if is_fit else ("reference",)


def _check_rows(op: str, name: str, h: torch.Tensor, plan: RowPlan) -> None:
    check_float(op, name, h)
    if h.dim() != 2 or h.shape[1] % 2 or not h.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous [R, 2I], got shape {tuple(h.shape)} stride {h.stride()}")
    check_plan(op, plan, num_rows=h.shape[0])
    if h.device != plan.row_of.device:
        raise ValueError(f"{op}: {name} is on {h.device}, but the plan is on {plan.row_of.device}")


def _check_quantizable(op: str, h: torch.Tensor, plan: RowPlan, dual: bool) -> None:
    _check_rows(op, "h", h, plan)
    if h.dtype not in (torch.bfloat16, torch.float32) or h.shape[1] % (2 * BLOCK):
        raise ValueError(
            f"{op}: h must be bfloat16 or float32 [R, 2I] with I divisible by 128, got {h.dtype} {tuple(h.shape)}"
        )
    if dual and plan.align != BLOCK:
        raise ValueError(f"{op}: dual needs a plan with align=128, got align={plan.align}")


def _check_grad(op: str, grad: torch.Tensor, h: torch.Tensor) -> None:
    wanted = (h.shape[0], h.shape[1] // 2)
    if grad.shape != wanted or grad.dtype != h.dtype or grad.device != h.device or not grad.is_contiguous():
        raise ValueError(
            f"{op}: grad must be contiguous {h.dtype} {wanted} on {h.device} as h, "
            f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
        )
