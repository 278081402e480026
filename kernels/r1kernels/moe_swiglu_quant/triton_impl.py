"""Triton kernels of moe_swiglu_quant.

A 1x128 block needs 128 columns of a row, a 128x1 block 128 rows of a column. The forward with both takes 128x128 tiles;
the backward has too many values at hand for that, so its transposed outputs have a kernel of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from r1kernels.moe_plan import RowPlan
from r1kernels.moe_swiglu_quant.reference import GradFields
from r1kernels.triton_cast import INTERPRETED, e4m3_scales, round_to

BLOCK = 128
FORWARD_ROWS, FORWARD_WARPS = 16, 4  # of a program that takes whole 1x128 blocks
BACKWARD_ROWS, BACKWARD_WARPS = 4, 1  # a warp has its rows for itself: no barrier, nothing through shared memory
DUAL_WARPS = 8  # of 128x128 tiles
TRANSPOSED_COLUMNS, TRANSPOSED_WARPS = 32, 8  # of 128x1 blocks: two programs a multiprocessor
AMAX_FLOOR = tl.constexpr(1e-30)


@triton.jit
def _quantize(x, axis: tl.constexpr):
    """(e4m3 values, scale) of a [rows, 128] or [128, columns] block with one scale along `axis`."""
    # As integers without the sign NaN is above infinity, and infinity above all others. So either becomes the scale of
    # its block: nothing is hidden.
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(size, axis).to(tl.float32, bitcast=True)
    amax = tl.where(amax < AMAX_FLOOR, AMAX_FLOOR, amax)
    factor, scale = e4m3_scales(amax)
    return round_to(x * tl.expand_dims(factor, axis), tl.float8e4nv), scale


@triton.jit
def _store_transposed(values, values_t_ptr, scale, scale_t_ptr, first_row, rows, columns, start, length, num_columns):
    """values [128 rows, 128 columns] into the expert's [num_columns, length] block, and their scales."""
    place = start * num_columns + columns[:, None].to(tl.int64) * length + (first_row - start) + rows[None, :]
    tl.store(values_t_ptr + place, tl.trans(values))
    tl.store(scale_t_ptr + (first_row // rows.shape[0]) * num_columns + columns, scale)


@triton.jit
def _expert_block(expert_of_ptr, offsets_ptr, first_row):
    """(first row, number of rows) of the expert that a block of 128 rows belongs to."""
    expert = tl.load(expert_of_ptr + first_row)
    start = tl.multiple_of(tl.load(offsets_ptr + expert).to(tl.int64), 128)
    return start, tl.multiple_of(tl.load(offsets_ptr + expert + 1).to(tl.int64) - start, 128)


@triton.jit
def _forward_kernel(
    h_ptr,  # [R, 2I] bf16 or f32
    weights_ptr,  # [T, K] f32, or None
    slot_of_ptr,  # [R] i32
    expert_of_ptr,  # [R] i32
    offsets_ptr,  # [E + 1] i32
    act_ptr,  # [R, I] as h, out, or None
    values_ptr,  # [R, I] e4m3, out, or None
    scale_ptr,  # [I / 128, R] f32, out
    values_t_ptr,  # [R * I] e4m3, out, or None
    scale_t_ptr,  # [R / 128, I] f32, out
    num_rows,
    num_columns,
    rows_in_use_ptr,  # offsets + E
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    if first_row >= tl.load(rows_in_use_ptr):
        return
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slot_of_ptr + first_row + row, mask=first_row + row < num_rows, other=-1)
    inside = (slot >= 0)[:, None]
    place = (first_row + row)[:, None] * (2 * num_columns) + column[None, :]
    gate = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + place + num_columns, mask=inside, other=0.0).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    weight = tl.full([ROWS], 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0)
    row_inside = first_row + row < num_rows
    out = (first_row + row)[:, None] * num_columns + column[None, :]
    if act_ptr is not None:
        tl.store(act_ptr + out, round_to(act * weight[:, None], act_ptr.dtype.element_ty), mask=row_inside[:, None])
    if values_ptr is not None:
        values, scale = _quantize(act, 1)
        tl.store(values_ptr + out, values, mask=row_inside[:, None])
        tl.store(scale_ptr + tl.program_id(1) * num_rows + first_row + row, scale * weight, mask=row_inside)
    if values_t_ptr is not None:
        start, length = _expert_block(expert_of_ptr, offsets_ptr, first_row)
        values, scale = _quantize(act * weight[:, None], 0)
        _store_transposed(values, values_t_ptr, scale, scale_t_ptr, first_row, row, column, start, length, num_columns)


@triton.jit
def _backward_kernel(
    grad_ptr,  # [R, I] as h
    h_ptr,  # [R, 2I] bf16 or f32
    weights_ptr,  # [T, K] f32, or None
    slot_of_ptr,  # [R] i32
    wide_grad_ptr,  # [R, 2I] bf16 or f32, out, or None
    wide_act_ptr,  # [R, I] bf16 or f32, out, or None
    values_ptr,  # [R, 2I] e4m3, out, or None
    scale_ptr,  # [2I / 128, R] f32, out
    grad_weights_ptr,  # [T, K] f32, out, or None
    num_rows,
    num_columns,
    rows_in_use_ptr,  # offsets + E
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    if first_row >= tl.load(rows_in_use_ptr):
        return
    row = tl.arange(0, ROWS)
    row_inside = first_row + row < num_rows
    slot = tl.load(slot_of_ptr + first_row + row, mask=row_inside, other=-1)
    inside = (slot >= 0)[:, None]
    weight = tl.full([ROWS], 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0)
    grad_weight = tl.zeros([ROWS], tl.float32)
    for block in range(num_columns // COLUMNS):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        place = (first_row + row)[:, None] * (2 * num_columns) + column[None, :]
        out = (first_row + row)[:, None] * num_columns + column[None, :]
        gate = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + place + num_columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + out, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        grad_weight += tl.sum(grad * silu * up, 1)
        act = silu * up * weight[:, None]
        grad *= weight[:, None]
        grad_up = grad * silu
        grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        if wide_act_ptr is not None:
            dtype: tl.constexpr = wide_act_ptr.dtype.element_ty
            tl.store(wide_act_ptr + out, round_to(act, dtype), mask=row_inside[:, None])
            tl.store(wide_grad_ptr + place, round_to(grad_gate, dtype), mask=row_inside[:, None])
            tl.store(wide_grad_ptr + place + num_columns, round_to(grad_up, dtype), mask=row_inside[:, None])
        if values_ptr is not None:
            values, scale = _quantize(grad_gate, 1)
            tl.store(values_ptr + place, values, mask=row_inside[:, None])
            tl.store(scale_ptr + block * num_rows + first_row + row, scale, mask=row_inside)
            values, scale = _quantize(grad_up, 1)
            tl.store(values_ptr + place + num_columns, values, mask=row_inside[:, None])
            up_block = block + num_columns // COLUMNS
            tl.store(scale_ptr + up_block * num_rows + first_row + row, scale, mask=row_inside)
    if grad_weights_ptr is not None:
        tl.store(grad_weights_ptr + slot, grad_weight, mask=slot >= 0)


@triton.jit
def _backward_transposed_kernel(
    grad_ptr,  # [R, I] as h
    h_ptr,  # [R, 2I] bf16 or f32
    weights_ptr,  # [T, K] f32, or None
    slot_of_ptr,  # [R] i32
    expert_of_ptr,  # [R] i32
    offsets_ptr,  # [E + 1] i32
    values_t_ptr,  # [R * 2I] e4m3, out
    scale_t_ptr,  # [R / 128, 2I] f32, out
    act_t_ptr,  # [R * I] e4m3, out
    act_scale_t_ptr,  # [R / 128, I] f32, out
    num_columns,
    rows_in_use_ptr,  # offsets + E
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    if first_row >= tl.load(rows_in_use_ptr):
        return
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slot_of_ptr + first_row + row)
    inside = (slot >= 0)[:, None]
    weight = tl.full([ROWS], 1.0, tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0)
    place = (first_row + row)[:, None] * (2 * num_columns) + column[None, :]
    gate = tl.load(h_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + place + num_columns, mask=inside, other=0.0).to(tl.float32)
    out = (first_row + row)[:, None] * num_columns + column[None, :]
    grad = tl.load(grad_ptr + out, mask=inside, other=0.0).to(tl.float32) * weight[:, None]
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    start, length = _expert_block(expert_of_ptr, offsets_ptr, first_row)
    values, scale = _quantize(gate * sigmoid * up * weight[:, None], 0)
    _store_transposed(values, act_t_ptr, scale, act_scale_t_ptr, first_row, row, column, start, length, num_columns)
    values, scale = _quantize(grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), 0)
    _store_transposed(values, values_t_ptr, scale, scale_t_ptr, first_row, row, column, start, length, 2 * num_columns)
    values, scale = _quantize(grad * gate * sigmoid, 0)
    column += num_columns
    _store_transposed(values, values_t_ptr, scale, scale_t_ptr, first_row, row, column, start, length, 2 * num_columns)


def swiglu(h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None) -> torch.Tensor:
    """(h [R, 2I], weights [T, K]) -> [R, I]."""
    act = h.new_empty(h.shape[0], h.shape[1] // 2)
    _launch_forward(h, plan, weights, act, None, None, None, None)
    return act


def swiglu_quant(
    h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """h [R, 2I] -> (values, scale, values_t, scale_t) of Fp8Rows [R, I]."""
    made = _fp8_rows(h, h.shape[1] // 2, dual)
    _launch_forward(h, plan, weights, None, *made)
    return made


def swiglu_backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(grad [R, I], h [R, 2I]) -> (d(h) [R, 2I], act [R, I], d(weights) [T, K])."""
    wide = torch.empty_like(h), torch.empty_like(grad)
    grad_weights = None if weights is None else torch.zeros_like(weights)
    _launch_backward(grad, h, plan, weights, grad_weights, *wide, None, None)
    return *wide, grad_weights


def swiglu_quant_backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool
) -> GradFields:
    """The fields of SwigluGrad, the first as a tuple."""
    made = _fp8_rows(h, h.shape[1], dual)
    grad_weights = None if weights is None else torch.zeros_like(weights)
    wide: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    act_t: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if dual:
        act_t = _fp8_rows(h, h.shape[1] // 2, dual)[2:]
    else:
        wide = torch.empty_like(h, dtype=torch.bfloat16), torch.empty_like(grad, dtype=torch.bfloat16)
    _launch_backward(grad, h, plan, weights, grad_weights, *wide, *made[:2])
    if dual and len(h):
        tensors = grad, h, weights, plan.slot_of, plan.expert_of, plan.offsets, *made[2:], *act_t
        columns = h.shape[1] // 2
        with torch.cuda.device_of(h):
            _backward_transposed_kernel[(len(h) // BLOCK, columns // TRANSPOSED_COLUMNS)](
                *tensors, columns, plan.offsets[-1:], BLOCK, TRANSPOSED_COLUMNS, num_warps=TRANSPOSED_WARPS
            )
    return made, *wide, *act_t, grad_weights


def _fp8_rows(
    h: torch.Tensor, columns: int, dual: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Empty (values, scale, values_t, scale_t) of Fp8Rows."""
    rows = h.shape[0]
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=h.device)
    scale = torch.empty(columns // BLOCK, rows, dtype=torch.float32, device=h.device).t()
    if not dual:
        return values, scale, None, None
    scale_t = torch.empty(rows // BLOCK, columns, dtype=torch.float32, device=h.device)
    return values, scale, torch.empty_like(values).flatten(), scale_t


def _launch_forward(
    h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, act: torch.Tensor | None, *fp8: torch.Tensor | None
) -> None:
    rows, columns = h.shape[0], h.shape[1] // 2
    if not rows:
        return
    size, num_warps = (BLOCK, DUAL_WARPS) if fp8[2] is not None else (FORWARD_ROWS, FORWARD_WARPS)
    grid = (triton.cdiv(rows, size), columns // BLOCK)
    tensors = h, weights, plan.slot_of, plan.expert_of, plan.offsets, act, *fp8
    with torch.cuda.device_of(h):
        _forward_kernel[grid](*tensors, rows, columns, plan.offsets[-1:], size, BLOCK, num_warps=num_warps)


def _launch_backward(
    grad: torch.Tensor,
    h: torch.Tensor,
    plan: RowPlan,
    weights: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    *out: torch.Tensor | None,
) -> None:
    rows, columns = h.shape[0], h.shape[1] // 2
    if not rows:
        return
    tensors = grad, h, weights, plan.slot_of, *out, grad_weights
    size = FORWARD_ROWS if INTERPRETED else BACKWARD_ROWS  # the interpreter takes as long for few rows as for many
    with torch.cuda.device_of(h):
        _backward_kernel[(triton.cdiv(rows, size),)](
            *tensors, rows, columns, plan.offsets[-1:], size, BLOCK, num_warps=BACKWARD_WARPS
        )
