"""Token rows in the order of their experts: permuted as they are, or quantized to FP8 on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.moe_plan import RowPlan, check_device, check_plan, check_weights
from r1kernels.tracing import is_traced


class Fp8Rows(NamedTuple):
    """FP8 rows in expert order, in the layouts that DeepGEMM's grouped kernels read on sm_90.

    Padding rows of `values` and `scale` hold anything; in `values_t` they are zero, because there they would be summed.
    """

    values: torch.Tensor  # [R, H] float8_e4m3fn
    scale: torch.Tensor  # [R, H / 128] float32, of each 1x128 block; stride (1, R)
    values_t: torch.Tensor | None  # [R * H] float8_e4m3fn: expert e is [H, its rows] from offsets[e] * H on
    scale_t: torch.Tensor | None  # [R / 128, H] float32, of each 128x1 block

    @property
    def transposed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(values_t, scale_t) of rows that were made with `dual`.

        Raises:
            ValueError: they were made without.
        """
        if self.values_t is None or self.scale_t is None:
            raise ValueError("Fp8Rows: found no transposed form, required dual=True where the rows are made")
        return self.values_t, self.scale_t


def moe_permute_quant(
    x: torch.Tensor,
    plan: RowPlan,
    *,
    weights: torch.Tensor | None = None,
    dual: bool = False,
    impl: Impl | None = None,
) -> Fp8Rows:
    """Quantize each token to FP8 in 1x128 blocks and copy it to the rows of its experts, reading it once.

    Blocks, scales and rounding are those of `fp8_quantize`. With `weights` row (t, k) stands for weights[t, k] * x[t]:
    the values are x's and the scale is multiplied, which rounds less than quantizing the product. Not differentiable:
    the gradient of the rows goes back to the tokens by `moe_combine(grad_rows, plan)`.

    Args:
        x:       [T, H] bfloat16 or float32, contiguous, H divisible by 128.
        plan:    of `moe_plan` for these T tokens.
        weights: [T, K] float32, optional factor of each row.
        dual:    also give the transposed form in 128x1 blocks (of weights * x in float32) that the weight gradient
                 reads; needs plan.align == 128.
        impl:    force an implementation; None picks one by device and dtype (the CUDA kernels take bfloat16).

    Returns:
        Fp8Rows; its last two are None without `dual`.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[1], [0]], dtype=torch.int32), 2, align=1)
        >>> rows = moe_permute_quant(torch.tensor([[1.0], [2.0]]).expand(2, 128).contiguous(), plan)
        >>> rows.values.float()[:, 0] * rows.scale[:, 0]
        tensor([2., 1.])
    """
    op = "moe_permute_quant"
    _check_tokens(op, x, plan)
    check_weights(op, plan, weights)
    check_fp8_rows(op, "x", x, plan, dual)
    if is_traced(x):
        from r1kernels.moe_permute_quant.torch_op import traced_quant

        return traced_quant(x, weights, plan, dual, impl)
    if choose(op, impl, x, have=implementations(x)) == "reference":
        from r1kernels.moe_permute_quant.reference import permute_quant
    else:
        from r1kernels.moe_permute_quant.cuda_impl import permute_quant
    return Fp8Rows(*permute_quant(x, plan, weights, dual))


def moe_permute_fp8(values: torch.Tensor, scale: torch.Tensor, plan: RowPlan, *, impl: Impl | None = None) -> Fp8Rows:
    """Copy tokens that are FP8 already (quantized before they crossed the wire) to the rows of their experts.

    Args:
        values: [T, H] float8_e4m3fn, contiguous, H divisible by 128.
        scale:  [T, H / 128] float32, contiguous (`fp8_quantize` with block (1, 128)).
        plan:   of `moe_plan` for these T tokens.
        impl:   force an implementation; None picks one by device.

    Returns:
        Fp8Rows without the transposed form.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import fp8_quantize, moe_plan
        >>> plan = moe_plan(torch.tensor([[1], [0]], dtype=torch.int32), 2, align=1)
        >>> quantized = fp8_quantize(torch.tensor([[1.0], [2.0]]).expand(2, 128).contiguous(), block=(1, 128))
        >>> rows = moe_permute_fp8(*quantized, plan)
        >>> rows.values.float()[:, 0] * rows.scale[:, 0]
        tensor([2., 1.])
    """
    op = "moe_permute_fp8"
    _check_tokens(op, values, plan, name="values")
    if values.dtype != torch.float8_e4m3fn or values.shape[1] % 128:
        raise ValueError(
            f"{op}: values must be torch.float8_e4m3fn [T, H] with H divisible by 128, "
            f"got {values.dtype} {tuple(values.shape)}"
        )
    wanted = (values.shape[0], values.shape[1] // 128)
    if scale.shape != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{op}: scale must be contiguous float32 {wanted}, got {scale.dtype} {tuple(scale.shape)}")
    check_device(op, plan, scale=scale)
    if is_traced(values):
        from r1kernels.moe_permute_quant import torch_op
        from r1kernels.moe_plan.torch_op import tensors_of

        values, scale = torch_op.permute_fp8(values, scale, tensors_of(plan), plan.align, impl)
        return Fp8Rows(values, scale, None, None)
    if choose(op, impl, values, have=("cuda", "reference")) == "cuda":
        from r1kernels.moe_permute_quant.cuda_impl import permute_fp8
    else:
        from r1kernels.moe_permute_quant.reference import permute_fp8
    return Fp8Rows(*permute_fp8(values, scale, plan), None, None)


def moe_permute(x: torch.Tensor, plan: RowPlan, *, impl: Impl | None = None) -> torch.Tensor:
    """Copy each token to the rows of its experts; differentiable.

    Args:
        x:    [T, H] floating point, contiguous.
        plan: of `moe_plan` for these T tokens.
        impl: force an implementation; None picks one by device and dtype (the CUDA kernels take bfloat16 with H
              divisible by 8).

    Returns:
        [R, H] in x's dtype. Padding between experts is zero; rows from plan.offsets[E] on hold anything.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit, or the plan is for other ids.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[1], [0], [1]], dtype=torch.int32), 2, align=1)
        >>> moe_permute(torch.tensor([[1.0], [2.0], [3.0]]), plan).flatten()
        tensor([2., 1., 3.])
    """
    op = "moe_permute"
    check_float(op, "x", x)
    _check_tokens(op, x, plan)
    if is_traced(x):
        from r1kernels.moe_permute_quant import torch_op
        from r1kernels.moe_plan.torch_op import tensors_of

        return torch_op.permute(x, tensors_of(plan), plan.align, impl)
    return _Permute.apply(x, plan, choose(op, impl, x, have=implementations(x, columns=8)))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: RowPlan, impl: str) -> torch.Tensor:
        ctx.plan, ctx.impl = plan, impl
        if impl == "cuda":
            from r1kernels.moe_permute_quant.cuda_impl import permute
        else:
            from r1kernels.moe_permute_quant.reference import permute
        return permute(x, plan)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if ctx.impl == "cuda":
            from r1kernels.moe_combine.cuda_impl import combine
        else:
            from r1kernels.moe_combine.reference import combine
        return combine(grad_rows.contiguous(), ctx.plan, None, None), None, None


def implementations(x: torch.Tensor, columns: int = 128) -> tuple[str, ...]:
    """What can run for this dtype and width: the CUDA kernels read 16 bytes of bfloat16 at a time."""
    is_fit = x.dtype == torch.bfloat16 and x.shape[-1] % columns == 0
    return ("cuda", "reference") if is_fit else ("reference",)


def check_fp8_rows(op: str, name: str, x: torch.Tensor, plan: RowPlan, dual: bool) -> None:
    """Require what quantized rows need: bfloat16 or float32 in blocks of 128, and a plan aligned to them for dual.

    Raises:
        ValueError: naming the op, what was found and what is required.
    """
    if x.dtype not in (torch.bfloat16, torch.float32) or x.shape[1] % 128:
        raise ValueError(
            f"{op}: {name} must be bfloat16 or float32 [T, H] with H divisible by 128, got {x.dtype} {tuple(x.shape)}"
        )
    if dual and plan.align != 128:
        raise ValueError(f"{op}: dual needs a plan with align=128, got align={plan.align}")


def _check_tokens(op: str, x: torch.Tensor, plan: RowPlan, name: str = "x") -> None:
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous [T, H], got shape {tuple(x.shape)} stride {x.stride()}")
    check_plan(op, plan, num_tokens=x.shape[0])
    if x.device != plan.row_of.device:
        raise ValueError(f"{op}: {name} is on {x.device}, but the plan is on {plan.row_of.device}")
