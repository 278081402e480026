"""Launches csrc/moe_combine.cu, and csrc/moe_permute_quant.cu for the quantized backward."""

from __future__ import annotations

import torch

from r1kernels import cuda_lib
from r1kernels.moe_permute_quant.cuda_impl import permute_quant
from r1kernels.moe_plan import RowPlan


def combine(
    rows: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """(rows [R, H] bfloat16, weights [T, K], residual [T, H]) -> [T, H]."""
    out = rows.new_empty(plan.num_tokens, rows.shape[1])
    if out.numel():
        sizes = (plan.num_tokens, rows.shape[1], plan.top_k)
        weights = None if weights is None else weights.float()
        cuda_lib.launch("r1_moe_combine", rows, plan.row_of, weights, residual, out, *sizes)
    return out


def combine_backward(
    grad: torch.Tensor, rows: torch.Tensor | None, plan: RowPlan, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(grad [T, H] bfloat16, rows [R, H], weights [T, K]) -> (grad_rows [R, H], grad_weights [T, K] or None)."""
    grad_rows = grad.new_empty(plan.num_rows, grad.shape[1])
    grad_weights = None if rows is None else torch.empty_like(plan.row_of, dtype=torch.float32)
    if grad_rows.numel():
        weights = None if weights is None else weights.float()
        cuda_lib.launch(
            "r1_moe_combine_backward",
            *(grad, plan.row_of, plan.slot_of, plan.offsets, weights, rows, grad_rows, grad_weights),
            *(plan.num_tokens, plan.num_rows, plan.num_experts, grad.shape[1], plan.top_k),
        )
    return grad_rows, grad_weights


def combine_backward_quant(
    grad: torch.Tensor, rows: torch.Tensor | None, plan: RowPlan, weights: torch.Tensor, dual: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]:
    """The same with grad_rows quantized: (values, scale, values_t, scale_t) of Fp8Rows."""
    grad_weights = None if rows is None else torch.empty_like(plan.row_of, dtype=torch.float32)
    return permute_quant(grad, plan, weights, dual, rows, grad_weights), grad_weights
