"""What the grouped products mean: a loop over the experts, and for FP8 dequantized float32 matmuls."""

from __future__ import annotations

import torch

from r1kernels.fp8_cast import Fp8
from r1kernels.fp8_cast.reference import dequantize
from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_permute_quant.reference import untransposed
from r1kernels.moe_plan import RowPlan


def grouped_gemm(rows: torch.Tensor, weight: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """(rows [R, K], weight [E, N, K]) -> [R, N]."""
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(_spans(plan)):
        out[start:end] = rows[start:end] @ weight[e].t()
    return out


def grouped_wgrad(grad: torch.Tensor, rows: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """(grad [R, N], rows [R, K]) -> [E, N, K]."""
    return torch.stack([grad[start:end].t() @ rows[start:end] for start, end in _spans(plan)])


def gemm_fp8(rows: Fp8Rows, weight: Fp8, plan: RowPlan) -> torch.Tensor:
    """FP8 (rows [R, K], weight [E, N, K]) -> [R, N] bfloat16."""
    # PyTorch's grouped matmul has float32 on a CPU only.
    dtype = torch.float32 if rows.values.device.type == "cpu" else torch.bfloat16
    wide_rows = dequantize(rows.values, rows.scale, (1, 128), dtype)
    wide_weight = dequantize(weight.values, weight.scale, (128, 128), dtype)
    return torch.nn.functional.grouped_mm(wide_rows, wide_weight.mT, offs=plan.offsets[1:]).bfloat16()


def wgrad_fp8(
    grad_t: tuple[torch.Tensor, torch.Tensor],
    rows_t: tuple[torch.Tensor, torch.Tensor],
    plan: RowPlan,
    out: torch.Tensor,
) -> torch.Tensor:
    """Transposed FP8 rows of N and K columns, added to out [E, N, K]."""
    return out.add_(grouped_wgrad(untransposed(*grad_t, plan), untransposed(*rows_t, plan), plan))


def _spans(plan: RowPlan) -> list[tuple[int, int]]:
    """First row and end of each expert."""
    return list(zip(plan.offsets[:-1].tolist(), plan.offsets[1:].tolist(), strict=True))
