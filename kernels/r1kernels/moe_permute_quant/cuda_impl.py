"""Launches csrc/moe_permute_quant.cu."""

from __future__ import annotations

import torch

from r1kernels import cuda_lib
from r1kernels.moe_plan import RowPlan


def permute(x: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """x [T, H] bfloat16 -> [R, H], zero in the padding between experts."""
    rows = x.new_empty(plan.num_rows, x.shape[1])
    if rows.numel():
        cuda_lib.launch(
            "r1_moe_permute",
            *(x, plan.row_of, plan.slot_of, plan.offsets, rows),
            *(plan.num_tokens, plan.num_rows, plan.num_experts, x.shape[1], plan.top_k),
        )
    return rows


def permute_quant(
    x: torch.Tensor,
    plan: RowPlan,
    weights: torch.Tensor | None,
    dual: bool,
    rows: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(x [T, H] bfloat16, weights [T, K]) -> (values, scale, values_t, scale_t) of Fp8Rows.

    With rows [R, H] also writes dots[t, k] = dot(x[t], rows[row_of[t, k]]) to dots [T, K] float32.
    """
    weights = None if weights is None else weights.float()
    values, scale = _empty(x, plan)
    values_t = scale_t = None
    if dual:
        values_t = values.new_empty(values.numel())
        scale_t = scale.new_empty(plan.num_rows // 128, x.shape[1])
    if values.numel():
        sizes = (plan.num_rows, x.shape[1], plan.top_k)
        inputs = (x, plan.row_of, weights, rows)
        cuda_lib.launch("r1_moe_permute_quant", *inputs, values, scale, dots, plan.num_tokens, *sizes)
        if dual:
            transposed = (x, plan.slot_of, plan.expert_of, plan.offsets, weights)
            cuda_lib.launch("r1_moe_transpose_quant", *transposed, values_t, scale_t, *sizes)
    return values, scale, values_t, scale_t


def permute_fp8(values: torch.Tensor, scale: torch.Tensor, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [T, H], scale [T, H / 128]) -> (values [R, H], scale [R, H / 128] with stride (1, R))."""
    out, out_scale = _empty(values, plan)
    if out.numel():
        cuda_lib.launch(
            "r1_moe_permute_fp8",
            *(values, scale, plan.row_of, out, out_scale),
            *(plan.num_tokens, plan.num_rows, values.shape[1], plan.top_k),
        )
    return out, out_scale


def _empty(x: torch.Tensor, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Places for the values [R, H] and scales [R, H / 128], stride (1, R), of x's rows."""
    values = x.new_empty(plan.num_rows, x.shape[1], dtype=torch.float8_e4m3fn)
    return values, x.new_empty(x.shape[1] // 128, plan.num_rows, dtype=torch.float32).t()
