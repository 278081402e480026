"""What the permutations mean: index_select, and the quantization of fp8_cast."""

from __future__ import annotations

import torch

from r1kernels.fp8_cast.reference import dequantize, quantize
from r1kernels.moe_plan import RowPlan


def permute(x: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(x [T, H], weights [T, K]) -> [R, H], zero in padding."""
    if not plan.num_tokens:
        return x.new_zeros(plan.num_rows, x.shape[1])
    rows = x.index_select(0, plan.token_of.clamp(min=0))
    if weights is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = (rows.to(wide) * row_weights(weights, plan)).to(x.dtype)
    return torch.where(plan.slot_of[:, None] < 0, 0, rows)


def permute_quant(
    x: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(x [T, H], weights [T, K]) -> (values, scale, values_t, scale_t) of Fp8Rows."""
    values, scale = permute_fp8(*quantize(x, (1, 128)), plan)
    if weights is not None and plan.num_tokens:
        scale *= row_weights(weights, plan)
    if not dual:
        return values, scale, None, None
    return values, scale, *transposed(permute(x.float(), plan, weights), plan)


def permute_fp8(values: torch.Tensor, scale: torch.Tensor, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [T, H], scale [T, H / 128]) -> (values [R, H], scale [R, H / 128] with stride (1, R))."""
    rows = permute(values.view(torch.uint8), plan).view(values.dtype)
    return rows, permute(scale, plan).t().contiguous().t()


def transposed(rows: torch.Tensor, plan: RowPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [R, H], zero in padding -> (values_t [R * H], scale_t [R / 128, H]), each expert as [H, its rows]."""
    values, scale = quantize(rows, (128, 1))
    flat = torch.zeros_like(values).flatten()
    # values_t position of (row, h): the expert's block starts at offset * H, its rows are contiguous in it.
    expert = plan.expert_of.long().view(-1, 128)[:, :1].expand(-1, 128).flatten()  # of the block: padding has it too
    start = plan.offsets.long()[expert.clamp(min=0)]
    length = plan.offsets.long()[expert.clamp(min=0) + 1] - start
    row, column = (torch.arange(n, device=rows.device) for n in rows.shape)
    place = (start * rows.shape[1] + row - start)[:, None] + column * length[:, None]
    # Rows after the last expert are zero; they stay where they are, in row order.
    place = torch.where(expert[:, None] < 0, row[:, None] * rows.shape[1] + column, place)
    flat.view(torch.uint8)[place.flatten()] = values.view(torch.uint8).flatten()
    return flat, scale


def untransposed(values_t: torch.Tensor, scale_t: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """(values_t [R * H], scale_t [R / 128, H]) -> [R, H] float32, the inverse of `transposed`."""
    columns = scale_t.shape[1]
    rows = torch.zeros(plan.num_rows, columns, device=values_t.device)
    for start, end in zip(plan.offsets[:-1].tolist(), plan.offsets[1:].tolist(), strict=True):
        block = values_t[start * columns : end * columns].view(columns, end - start)
        rows[start:end] = dequantize(block.t(), scale_t[start // 128 : end // 128], (128, 1))
    return rows


def row_weights(weights: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    """weights [T, K] -> [R, 1], that of each row; padding repeats the first."""
    return weights.flatten().index_select(0, plan.slot_of.clamp(min=0))[:, None]
