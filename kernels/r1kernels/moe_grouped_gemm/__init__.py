"""Matrix products of the experts: each expert's rows with its own weights, in FP8 or as they are."""

from __future__ import annotations

import torch

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.fp8_cast import Fp8
from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_plan import RowPlan, check_device, check_plan
from r1kernels.tracing import is_traced

TransposedRows = tuple[torch.Tensor, torch.Tensor]  # Fp8Rows.values_t [R * N], Fp8Rows.scale_t [R / 128, N]


def moe_grouped_gemm(rows: torch.Tensor, weight: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """out[r] = weight[expert of r] @ rows[r], by PyTorch's grouped matmul.

    Differentiable in both; that of weight is right where rows and the gradient are zero in the padding between experts,
    as `moe_permute`, `moe_swiglu` and the backward of `moe_combine` make them. On a GPU PyTorch's product takes
    bfloat16 only: other dtypes are looped over, expert by expert, and wait for the device.

    Args:
        rows:   [R, K] floating point, contiguous, in expert order.
        weight: [E, N, K] of the same dtype, or the transposed view of [E, K, N] (for the gradient of rows).
        plan:   of `moe_plan`.

    Returns:
        [R, N] in the rows' dtype. Rows from plan.offsets[E] on hold anything.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the plan is for other ids.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0], [1]], dtype=torch.int32), 2, align=1)
        >>> weight = torch.stack([torch.eye(4), 10 * torch.eye(4)])
        >>> moe_grouped_gemm(torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]]), weight, plan)
        tensor([[ 1.,  2.,  0.,  0.],
                [30., 40.,  0.,  0.]])
    """
    op = "moe_grouped_gemm"
    check_float(op, "rows", rows)
    _check_operands(op, rows, weight, plan)
    if weight.dtype != rows.dtype:
        raise ValueError(f"{op}: weight must be {rows.dtype} as rows, got {weight.dtype}")
    if is_traced(rows):
        from r1kernels.moe_grouped_gemm import torch_op
        from r1kernels.moe_plan.torch_op import tensors_of

        return torch_op.gemm(rows, weight, tensors_of(plan), plan.align)
    if not _has_grouped_mm(rows):
        from r1kernels.moe_grouped_gemm.reference import grouped_gemm

        return grouped_gemm(rows, weight, plan)
    return torch.nn.functional.grouped_mm(rows, weight.mT, offs=plan.offsets[1:])


def moe_grouped_wgrad(grad: torch.Tensor, rows: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """The gradient of `moe_grouped_gemm` in weight: out[e] = sum over the expert's rows of grad[r] rows[r]^T.

    Args:
        grad: [R, N] floating point, contiguous; zero in the padding between experts.
        rows: [R, K] of the same dtype; zero in the padding between experts.
        plan: of `moe_plan`.

    Returns:
        [E, N, K] in the same dtype, summed in float32; zero for an expert without rows.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the plan is for other ids.

    Example:
        >>> import torch
        >>> from r1kernels import moe_plan
        >>> plan = moe_plan(torch.tensor([[0], [1]], dtype=torch.int32), 2, align=1)
        >>> grad, rows = torch.eye(2, 4), torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]])
        >>> moe_grouped_wgrad(grad, rows, plan)[:, :2, :2].tolist()
        [[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 4.0]]]
    """
    op = "moe_grouped_wgrad"
    check_float(op, "grad", grad)
    for name, tensor in (("grad", grad), ("rows", rows)):
        if tensor.dim() != 2 or not tensor.is_contiguous() or tensor.dtype != grad.dtype:
            raise ValueError(f"{op}: {name} must be contiguous {grad.dtype} [R, .], got {tensor.dtype} {tensor.shape}")
        check_plan(op, plan, num_rows=tensor.shape[0])
    check_device(op, plan, grad=grad, rows=rows)
    if is_traced(grad):
        from r1kernels.moe_grouped_gemm import torch_op
        from r1kernels.moe_plan.torch_op import tensors_of

        return torch_op.wgrad(grad.detach(), rows.detach(), tensors_of(plan), plan.align)
    if not _has_grouped_mm(grad):
        from r1kernels.moe_grouped_gemm.reference import grouped_wgrad

        return grouped_wgrad(grad, rows, plan)
    return torch.nn.functional.grouped_mm(grad.t(), rows, offs=plan.offsets[1:])


def moe_grouped_gemm_fp8(rows: Fp8Rows, weight: Fp8, plan: RowPlan, *, impl: Impl | None = None) -> torch.Tensor:
    """`moe_grouped_gemm` of FP8 rows in 1x128 blocks and FP8 weights in 128x128 blocks (DeepSeek-V3, section 3.3).

    DeepGEMM sums each 128 products in the tensor core and promotes them to float32; the reference dequantizes and
    multiplies in float32, on a GPU in bfloat16.

    Args:
        rows:   values [R, K] and scale [R, K / 128] of `moe_permute_quant` or `moe_swiglu_quant`.
        weight: values [E, N, K] and scale [E, N / 128, K / 128] of `fp8_quantize` with block (128, 128).
        plan:   of `moe_plan` with align=128.
        impl:   "deep_gemm" (PyPI sgl-deep-gemm, compute capability 9) or "reference"; None picks one by device.

    Returns:
        [R, N] bfloat16. Padding rows hold anything.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the plan is for other ids or not aligned to 128.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import fp8_quantize, moe_permute_quant, moe_plan
        >>> plan = moe_plan(torch.tensor([[0]], dtype=torch.int32), 1, align=128)
        >>> rows = moe_permute_quant(torch.ones(1, 128), plan)
        >>> weight = fp8_quantize(torch.full((1, 128, 128), 0.5), block=(128, 128))
        >>> moe_grouped_gemm_fp8(rows, weight, plan)[0, :2]
        tensor([64., 64.], dtype=torch.bfloat16)
    """
    op = "moe_grouped_gemm_fp8"
    _check_operands(op, rows.values, weight.values, plan)
    _check_fp8(op, rows, weight, plan)
    if is_traced(rows.values):
        from r1kernels.moe_grouped_gemm import torch_op
        from r1kernels.moe_plan.torch_op import tensors_of

        return torch_op.gemm_fp8(*rows[:2], *weight, tensors_of(plan), plan.align, impl)
    if choose(op, impl, rows.values, have=("deep_gemm", "reference")) == "deep_gemm":
        from r1kernels.moe_grouped_gemm.deep_gemm_impl import gemm_fp8
    else:
        from r1kernels.moe_grouped_gemm.reference import gemm_fp8
    return gemm_fp8(rows, weight, plan)


def moe_grouped_wgrad_fp8(
    grad_t: TransposedRows,
    rows_t: TransposedRows,
    plan: RowPlan,
    *,
    out: torch.Tensor | None = None,
    rows_per_expert: list[int] | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """`moe_grouped_wgrad` of transposed FP8 rows in 128x1 blocks, added to `out` in float32.

    Args:
        grad_t:          (values_t [R * N], scale_t [R / 128, N]) of `Fp8Rows`.
        rows_t:          (values_t [R * K], scale_t [R / 128, K]).
        plan:            of `moe_plan` with align=128.
        out:             [E, N, K] float32, contiguous, added to (Megatron's main_grad); None starts from zero.
        rows_per_expert: plan.offsets.diff() as host numbers. DeepGEMM takes them from the host; None asks the device
                         and waits for it. Expert parallelism has them at hand from its dispatch.
        impl:            "deep_gemm" or "reference"; None picks one by device.

    Returns:
        `out`, or a new [E, N, K] float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the plan is for other ids or not aligned to 128.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> from r1kernels import moe_permute_quant, moe_plan
        >>> plan = moe_plan(torch.tensor([[0]], dtype=torch.int32), 1, align=128)
        >>> rows = moe_permute_quant(torch.ones(1, 128), plan, dual=True)
        >>> moe_grouped_wgrad_fp8(rows.transposed, rows.transposed, plan)[0, 0, :2]
        tensor([1., 1.])
    """
    op = "moe_grouped_wgrad_fp8"
    for name, (values, scale) in (("grad_t", grad_t), ("rows_t", rows_t)):
        wanted = (plan.num_rows // 128, scale.shape[-1])
        if scale.shape != wanted or values.shape != (plan.num_rows * wanted[1],):
            raise ValueError(
                f"{op}: {name} must be values [{plan.num_rows} * N] and scale [{wanted[0]}, N] for this plan, "
                f"got {tuple(values.shape)} and {tuple(scale.shape)}"
            )
    _check_align(op, plan)
    shape = (plan.num_experts, grad_t[1].shape[1], rows_t[1].shape[1])
    if out is not None and (out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous()):
        raise ValueError(f"{op}: out must be contiguous float32 {shape}, got {out.dtype} {tuple(out.shape)}")
    check_device(op, plan, grad_t=grad_t[0], grad_scale=grad_t[1], rows_t=rows_t[0], rows_scale=rows_t[1], out=out)
    if is_traced(grad_t[0]):
        from r1kernels.moe_grouped_gemm.torch_op import traced_wgrad_fp8

        return traced_wgrad_fp8(grad_t, rows_t, plan, out, rows_per_expert, impl)
    if out is None:
        out = torch.zeros(shape, dtype=torch.float32, device=grad_t[0].device)
    if choose(op, impl, grad_t[0], have=("deep_gemm", "reference")) == "deep_gemm":
        from r1kernels.moe_grouped_gemm import deep_gemm_impl

        return deep_gemm_impl.wgrad_fp8(grad_t, rows_t, plan, out, rows_per_expert)
    from r1kernels.moe_grouped_gemm import reference

    return reference.wgrad_fp8(grad_t, rows_t, plan, out)


def _has_grouped_mm(rows: torch.Tensor) -> bool:
    """PyTorch's grouped matmul takes bfloat16, and on a CPU float32 and float16 too; the rest are looped over."""
    return rows.dtype == torch.bfloat16 or (rows.device.type == "cpu" and rows.dtype != torch.float64)


def _check_operands(op: str, rows: torch.Tensor, weight: torch.Tensor, plan: RowPlan) -> None:
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"{op}: rows must be contiguous [R, K], got shape {tuple(rows.shape)} stride {rows.stride()}")
    check_plan(op, plan, num_rows=rows.shape[0])
    if weight.dim() != 3 or weight.shape[0] != plan.num_experts or weight.shape[2] != rows.shape[1]:
        raise ValueError(
            f"{op}: weight must be [E, N, K] with E={plan.num_experts} as the plan and K={rows.shape[1]} as the rows, "
            f"got {tuple(weight.shape)}"
        )
    if not rows.device == weight.device == plan.row_of.device:
        raise ValueError(
            f"{op}: rows are on {rows.device}, weight is on {weight.device}, the plan is on {plan.row_of.device}"
        )


def _check_fp8(op: str, rows: Fp8Rows, weight: Fp8, plan: RowPlan) -> None:
    (num_rows, k), (experts, n, _) = rows.values.shape, weight.values.shape
    for name, (values, scale), wanted in (
        ("rows", rows[:2], (num_rows, k // 128)),
        ("weight", weight, (experts, -(-n // 128), k // 128)),
    ):
        if values.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or scale.shape != wanted or k % 128:
            raise ValueError(
                f"{op}: {name} must be float8_e4m3fn with float32 scales {wanted} and K divisible by 128, "
                f"got {values.dtype} {tuple(values.shape)} and {scale.dtype} {tuple(scale.shape)}"
            )
    check_device(op, plan, rows_scale=rows.scale, weight_scale=weight.scale)
    _check_align(op, plan)


def _check_align(op: str, plan: RowPlan) -> None:
    if plan.align != 128:
        raise ValueError(f"{op}: a plan with align=128 is required, got align={plan.align}")
