"""logprob_entropy in Triton: one program a row; every thread sums up its own columns, so no barrier stops the loads.

Rows of a shared-memory cluster would read no less: two bytes an element is the floor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.logprob_entropy.triton_rows import (
    FORBIDDEN,
    LOG2_E,
    columns,
    far,
    is_used,
    label_logit,
    load_logits,
    local_label,
    row_gradient,
    row_scale,
    row_sums,
    store_row,
)

LENGTHS = ["num_inner", "num_rows", "ignore_index", "vocab_start"]  # no kernel of its own for a kind of value
# Of these a program reads one number: whether they are aligned, which may depend on the number of rows, is no matter.
ROWS = ["labels_ptr", "mask_ptr", "temperature_ptr", "keep_ids_ptr", "keep_offsets_ptr"]
SUMS = ["top_ptr", "log_total_ptr", "entropy_ptr", "grad_logp_ptr", "grad_entropy_ptr"]


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=ROWS)
def partials_kernel(
    logits_ptr,  # [outer, inner, V_local] bf16, f16 or f32
    stride_outer,
    stride_inner,
    stride_column,
    num_inner,
    vocab,
    labels_ptr,  # [N] i64
    mask_ptr,  # [N] i1, or None
    ignore_index,
    temperature_ptr,  # [N] f32, or None
    scale,
    softcap,
    pre_scale,
    keep_ids_ptr,  # [num_ids] i64, or None
    keep_offsets_ptr,  # [N + 1] i64, or None
    vocab_start,
    out_ptr,  # [5, N] f32, out
    num_rows,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    REPEAT: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + (row // num_inner) * stride_outer + (row % num_inner) * stride_inner
    used = is_used(labels_ptr, mask_ptr, ignore_index, row)
    label = local_label(labels_ptr, row, vocab_start, vocab)
    scale = row_scale(temperature_ptr, scale, row)
    begin = tl.zeros((), tl.int64)
    count = tl.zeros((), tl.int32) + vocab
    if keep_ids_ptr is not None:
        begin = tl.load(keep_offsets_ptr + row)
        count = (tl.load(keep_offsets_ptr + row + 1) - begin).to(tl.int32)
    top, total, weighted, squared, is_kept = row_sums(
        row_ptr,
        stride_column,
        vocab,
        label,
        tl.where(used, count, 0),
        scale,
        softcap,
        pre_scale,
        keep_ids_ptr,
        begin,
        vocab_start,
        SOFTCAP,
        ENTROPY,
        SQUARES,
        REPEAT,
        THREADS,
        WIDTH,
        "",
    )
    is_here = used & (label >= 0)
    picked = label_logit(row_ptr, label, stride_column, is_here, pre_scale, softcap, SOFTCAP) * scale
    tl.store(out_ptr + row, tl.where(top > FORBIDDEN, top * scale, FORBIDDEN))
    tl.store(out_ptr + num_rows + row, total)
    tl.store(out_ptr + 2 * num_rows + row, weighted)
    tl.store(out_ptr + 3 * num_rows + row, squared)
    tl.store(out_ptr + 4 * num_rows + row, tl.where(is_here, tl.where(is_kept, picked, float("-inf")), 0.0))


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=ROWS)
def merge_kernel(
    parts_ptr,  # [ranks, 5, N] f32
    labels_ptr,  # [N] i64
    mask_ptr,  # [N] i1, or None
    out_ptr,  # [6, N] f32, out: logp, entropy, lse, sum_pi_sq, top, log_total
    ignore_index,
    vocab_size,
    num_rows,
    ranks,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    label = tl.load(labels_ptr + row, mask=inside, other=0)
    used = label != ignore_index
    if mask_ptr is not None:
        used = used & (tl.load(mask_ptr + row, mask=inside, other=0) != 0)
    step = num_rows.to(tl.int64) * 5
    top = tl.full((BLOCK,), FORBIDDEN, tl.float32)
    for rank in range(ranks):
        top = tl.maximum(top, tl.load(parts_ptr + rank * step + row, mask=inside, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squared = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    for rank in range(ranks):
        part_ptr = parts_ptr + rank * step + row
        lift = tl.load(part_ptr, mask=inside, other=0.0) - top
        rescale = tl.exp2(lift * LOG2_E)
        part_total = tl.load(part_ptr + num_rows, mask=inside, other=1.0)
        total += part_total * rescale
        weighted += (tl.load(part_ptr + 2 * num_rows, mask=inside, other=0.0) + lift * part_total) * rescale
        squared += tl.load(part_ptr + 3 * num_rows, mask=inside, other=0.0) * rescale * rescale
        picked += tl.load(part_ptr + 4 * num_rows, mask=inside, other=0.0)
    # No distribution, or no label: NaN, as nobody looks at values on the way to the GPU.
    is_sound = (top > FORBIDDEN / 2) & (label >= 0) & (label < vocab_size)
    log_total = tl.where(is_sound, tl.log(total), float("nan"))
    out_ptr += row
    tl.store(out_ptr, tl.where(used, picked - top - log_total, 0.0), mask=inside)
    tl.store(out_ptr + num_rows, tl.where(used, log_total - weighted / total, 0.0), mask=inside)
    tl.store(out_ptr + 2 * num_rows, tl.where(used, top + log_total, 0.0), mask=inside)
    tl.store(out_ptr + 3 * num_rows, tl.where(used, squared / (total * total), 0.0), mask=inside)
    tl.store(out_ptr + 4 * num_rows, top, mask=inside)
    tl.store(out_ptr + 5 * num_rows, log_total, mask=inside)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=[*ROWS, *SUMS])
def gradient_kernel(
    logits_ptr,  # [outer, inner, V_local] bf16, f16 or f32
    stride_outer,
    stride_inner,
    stride_column,
    num_inner,
    vocab,
    labels_ptr,  # [N] i64
    mask_ptr,  # [N] i1, or None
    ignore_index,
    temperature_ptr,  # [N] f32, or None
    scale,
    softcap,
    pre_scale,
    keep_ids_ptr,  # [num_ids] i64, or None
    keep_offsets_ptr,  # [N + 1] i64, or None
    vocab_start,
    top_ptr,  # [N] f32
    log_total_ptr,  # [N] f32
    entropy_ptr,  # [N] f32, or None
    grad_logp_ptr,  # [N] f32, or None
    grad_entropy_ptr,  # [N] f32, or None
    out_ptr,  # [outer, inner, V_local] like logits, may be them; with a keep set [num_ids] f32; out
    out_outer,
    out_inner,
    out_column,
    SOFTCAP: tl.constexpr,
    REPEAT: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = REPEAT * THREADS * WIDTH
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + (row // num_inner) * stride_outer + (row % num_inner) * stride_inner
    used = is_used(labels_ptr, mask_ptr, ignore_index, row)
    label = local_label(labels_ptr, row, vocab_start, vocab)
    scale = row_scale(temperature_ptr, scale, row)
    top = tl.load(top_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    to_logp = tl.zeros((), tl.float32)
    if grad_logp_ptr is not None:
        to_logp = tl.load(grad_logp_ptr + row).to(tl.float32) * scale
    of_p = -to_logp
    to_entropy = tl.zeros((), tl.float32)
    if grad_entropy_ptr is not None:
        to_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32) * scale
        of_p -= to_entropy * (tl.load(entropy_ptr + row) - log_total)
    begin = tl.zeros((), tl.int64)
    count = tl.zeros((), tl.int32) + vocab
    if keep_ids_ptr is not None:
        begin = tl.load(keep_offsets_ptr + row)
        count = (tl.load(keep_offsets_ptr + row + 1) - begin).to(tl.int32)
        out_ptr += begin
    else:
        out_ptr += (row // num_inner) * out_outer + (row % num_inner) * out_inner
    num_read = tl.where(used, count, 0)
    for start in range(0, num_read, BLOCK):
        index = start + tl.arange(0, BLOCK)
        column, inside = columns(keep_ids_ptr, begin, index, count, vocab_start, vocab)
        x = load_logits(row_ptr, column, inside, stride_column, pre_scale, softcap, SOFTCAP, "")
        grad = row_gradient(
            x,
            column,
            label,
            scale,
            softcap,
            pre_scale,
            top,
            log_total,
            to_logp,
            of_p,
            to_entropy,
            SOFTCAP,
            grad_entropy_ptr is not None,
        )
        if keep_ids_ptr is not None:
            tl.store(out_ptr + index, tl.where(inside, grad, 0.0), mask=index < count)
        else:
            store_row(out_ptr, column, out_column, grad, inside)
    for start in range(num_read, count, BLOCK):  # a row that is ignored, which is not read
        index = start + tl.arange(0, BLOCK)
        zero = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
        if keep_ids_ptr is not None:
            tl.store(out_ptr + index, zero, mask=index < count)
        else:
            tl.store(out_ptr + far(index, out_column), zero, mask=index < vocab)


@triton.jit(do_not_specialize=["num_inner", "vocab_start"])
def scatter_kernel(
    kept_ptr,  # [num_ids] f32
    keep_ids_ptr,  # [num_ids] i64
    keep_offsets_ptr,  # [N + 1] i64
    out_ptr,  # [outer, inner, V_local] bf16, f16 or f32, out
    out_outer,
    out_inner,
    out_column,
    num_inner,
    vocab_start,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_ptr += (row // num_inner) * out_outer + (row % num_inner) * out_inner
    begin = tl.load(keep_offsets_ptr + row)
    count = (tl.load(keep_offsets_ptr + row + 1) - begin).to(tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        column, inside = columns(keep_ids_ptr, begin, index, count, vocab_start, vocab)
        grad = tl.load(kept_ptr + begin + index, mask=index < count, other=0.0)
        store_row(out_ptr, column, out_column, grad, inside)
