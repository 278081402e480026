"""What moe_combine and its backward mean: a loop over the choices, in float32 or wider."""

from __future__ import annotations

import torch

from r1kernels.moe_permute_quant.reference import permute, permute_quant
from r1kernels.moe_plan import RowPlan


def combine(
    rows: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """(rows [R, H], weights [T, K], residual [T, H]) -> [T, H]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_zeros(plan.num_tokens, rows.shape[1], dtype=wide)
    for k in range(plan.top_k):
        chosen = _row_of_choice(rows, plan, k)
        out = out + (chosen if weights is None else chosen * weights[:, k, None])
    if residual is not None:
        out = out + residual
    return out.to(rows.dtype)


def combine_backward(
    grad: torch.Tensor, rows: torch.Tensor | None, plan: RowPlan, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(grad [T, H], rows [R, H], weights [T, K]) -> (grad_rows [R, H], grad_weights [T, K] if both are given)."""
    return permute(grad, plan, weights), None if rows is None or weights is None else _dots(grad, rows, plan, weights)


def combine_backward_quant(
    grad: torch.Tensor, rows: torch.Tensor | None, plan: RowPlan, weights: torch.Tensor, dual: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]:
    """The same with grad_rows quantized: (values, scale, values_t, scale_t) of Fp8Rows."""
    quantized = permute_quant(grad, plan, weights, dual)
    return quantized, None if rows is None else _dots(grad, rows, plan, weights)


def _dots(grad: torch.Tensor, rows: torch.Tensor, plan: RowPlan, weights: torch.Tensor) -> torch.Tensor:
    dots = [(grad * _row_of_choice(rows, plan, k)).sum(1) for k in range(plan.top_k)]
    return torch.stack(dots, dim=1).to(weights.dtype) if dots else torch.zeros_like(weights)


def _row_of_choice(rows: torch.Tensor, plan: RowPlan, k: int) -> torch.Tensor:
    """[T, H] in float32 or wider: each token's row of choice k, zero where the choice is -1."""
    row = plan.row_of[:, k]
    if not rows.shape[0]:
        return rows.new_zeros(len(row), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    chosen = rows.index_select(0, row.clamp(min=0)).to(torch.promote_types(rows.dtype, torch.float32))
    return torch.where(row[:, None] < 0, 0, chosen)
