"""Calls of DeepGEMM's grouped FP8 kernels for sm_90; the layouts are those that the quantizing ops write."""

from __future__ import annotations

import deep_gemm
import torch

from r1kernels.cuda_lib import check_vectors
from r1kernels.fp8_cast import Fp8
from r1kernels.moe_permute_quant import Fp8Rows
from r1kernels.moe_plan import RowPlan


def gemm_fp8(rows: Fp8Rows, weight: Fp8, plan: RowPlan) -> torch.Tensor:
    """FP8 (rows [R, K], weight [E, N, K]) -> [R, N] bfloat16."""
    for operand in (*rows[:2], *weight):  # read by the tensor memory accelerator
        check_vectors("moe_grouped_gemm_fp8", operand)
    out = torch.empty(plan.num_rows, weight.values.shape[1], dtype=torch.bfloat16, device=rows.values.device)
    with torch.cuda.device_of(out):  # it launches on the current device
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((rows.values, rows.scale), tuple(weight), out, plan.expert_of)
    return out


def wgrad_fp8(
    grad_t: tuple[torch.Tensor, torch.Tensor],
    rows_t: tuple[torch.Tensor, torch.Tensor],
    plan: RowPlan,
    out: torch.Tensor,
    rows_per_expert: list[int] | None,
) -> torch.Tensor:
    """Transposed FP8 rows of N and K columns, added to out [E, N, K]."""
    check_vectors("moe_grouped_wgrad_fp8", out)
    on_device = plan.offsets.diff()
    on_host = on_device.tolist() if rows_per_expert is None else rows_per_expert
    used = sum(on_host)

    def operand(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Without the tail that belongs to no expert; scales column-major, [N, blocks].
        return values[: used * scale.shape[1]], scale[: used // 128].t()

    with torch.cuda.device_of(out):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(operand(*grad_t), operand(*rows_t), out, on_host, on_device, out)
    return out
