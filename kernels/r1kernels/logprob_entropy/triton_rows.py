"""A row of logits, a block of columns at a time: what the kernels that read logits share.

A thread holds WIDTH neighbouring columns of each 128-bit load; blocks are reshaped to [REPEAT, THREADS, WIDTH] and
reduced inside the threads, which meet once, after the last block. One exponential an element, and one a thread and
block for the running maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.triton_cast import round_to

FORBIDDEN = tl.constexpr(-1e30)  # stands for -inf, where -inf * 0 would be NaN
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def is_used(labels_ptr, mask_ptr, ignore_index, row):
    used = tl.load(labels_ptr + row) != ignore_index
    if mask_ptr is not None:
        used = used & (tl.load(mask_ptr + row) != 0)
    return used


@triton.jit
def local_label(labels_ptr, row, vocab_start, vocab):
    """Column of the label in this slice, -1 where it has none; 32 bits, as it is compared with every column."""
    label = tl.load(labels_ptr + row) - vocab_start
    return tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)


@triton.jit
def row_scale(temperature_ptr, scale, row):
    """Factor from (capped) logits to z."""
    if temperature_ptr is not None:
        scale = scale / tl.load(temperature_ptr + row)
    return scale


@triton.jit
def columns(keep_ids_ptr, begin, index, count, vocab_start, vocab):
    """Columns of this slice and whether they are there; in a keep set, or all."""
    if keep_ids_ptr is None:
        return index, index < vocab  # not count, whose divisibility is unknown: the loads would be narrow
    else:
        inside = index < count
        column = tl.load(keep_ids_ptr + begin + index, mask=inside, other=-1) - vocab_start
        return column, inside & (column >= 0) & (column < vocab)


@triton.jit
def far(column, stride):
    """Offset of a column; 64 bits where columns are not neighbours."""
    if stride == 1:
        return column
    else:
        return column.to(tl.int64) * stride


@triton.jit
def load_logits(row_ptr, column, inside, stride_column, pre_scale, softcap, SOFTCAP: tl.constexpr, EVICT: tl.constexpr):
    """Float32 logits, capped; -inf where there is none, and FORBIDDEN for that."""
    at = row_ptr + far(column, stride_column)
    x = tl.load(at, mask=inside, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)
    if SOFTCAP:
        x = tl.where(inside, softcap * tanh(x * pre_scale), FORBIDDEN)
    # NaN is kept: tl.maximum alone would drop it.
    return tl.maximum(x, FORBIDDEN, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def label_logit(row_ptr, label, stride_column, is_here, pre_scale, softcap, SOFTCAP: tl.constexpr):
    """The (capped) logit of a label that is in this slice; else 0."""
    x = tl.load(row_ptr + label.to(tl.int64) * stride_column, mask=is_here, other=0.0).to(tl.float32)
    if SOFTCAP:
        x = softcap * tanh(x * pre_scale)
    return x


@triton.jit
def row_sums(
    row_ptr,
    stride_column,
    vocab,
    label,
    count,  # columns to read, or entries of the keep set
    scale,
    softcap,
    pre_scale,
    keep_ids_ptr,
    begin,
    vocab_start,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    REPEAT: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVICT: tl.constexpr,
):
    """With x the (capped) logits, top their maximum, e = exp(scale * (x - top)):

    -> top, sum of e, sum of e * scale * (x - top), sum of e^2, whether the label is in the keep set (True without one)
    """
    BLOCK: tl.constexpr = REPEAT * THREADS * WIDTH
    to_log2 = scale * LOG2_E
    is_kept = count >= 0
    if keep_ids_ptr is not None:
        is_kept = count < 0
    top = tl.full((THREADS,), FORBIDDEN, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    weighted = tl.zeros((THREADS,), tl.float32)
    squared = tl.zeros((THREADS,), tl.float32)
    for start in range(0, count, BLOCK):
        column, inside = columns(keep_ids_ptr, begin, start + tl.arange(0, BLOCK), count, vocab_start, vocab)
        if keep_ids_ptr is not None:
            is_kept = is_kept | (tl.max((inside & (column == label)).to(tl.int32), 0) != 0)
        x = load_logits(row_ptr, column, inside, stride_column, pre_scale, softcap, SOFTCAP, EVICT)
        x = tl.reshape(x, (REPEAT, THREADS, WIDTH))
        higher = tl.maximum(top, tl.max(tl.max(x, 2), 0))
        lift = top - higher
        rescale = tl.exp2(lift * to_log2)
        # Of differences, as they are exact beside a large common offset.
        t = x - higher[None, :, None]
        e = tl.exp2(t * to_log2)
        if ENTROPY:
            weighted = (weighted + lift * total) * rescale + tl.sum(tl.sum(e * t, 2), 0)
        if SQUARES:
            squared = squared * rescale * rescale + tl.sum(tl.sum(e * e, 2), 0)
        total = total * rescale + tl.sum(tl.sum(e, 2), 0)
        top = higher
    highest = tl.max(top, 0)
    lift = top - highest
    rescale = tl.exp2(lift * to_log2)
    weighted = tl.sum((weighted + lift * total) * rescale, 0) * scale
    squared = tl.sum(squared * rescale * rescale, 0)
    return highest, tl.sum(total * rescale, 0), weighted, squared, is_kept


@triton.jit
def row_gradient(
    x,  # a block of load_logits
    column,
    label,
    scale,
    softcap,
    pre_scale,
    top,  # of z, not of x
    log_total,
    to_logp,
    of_p,
    to_entropy,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Gradient of a block of logits: p * (of_p - to_entropy * (z - top)), and to_logp at the label."""
    t = x * scale - top
    p = tl.exp2((t - log_total) * LOG2_E)
    grad = p * of_p
    if ENTROPY:
        grad -= p * t * to_entropy
    grad = tl.where(column == label, grad + to_logp, grad)
    if SOFTCAP:
        part = x / softcap
        grad *= (1.0 - part * part) * (pre_scale * softcap)
    return grad


@triton.jit
def store_row(ptr, column, stride, values, inside):
    """Write float32 values, rounded."""
    tl.store(ptr + far(column, stride), round_to(values, ptr.dtype.element_ty), mask=inside)
