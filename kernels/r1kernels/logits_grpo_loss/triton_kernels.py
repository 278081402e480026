"""The kernels of logits_grpo_loss: a row's sums, its loss, its gradient; and what the backward pass multiplies with."""

from __future__ import annotations

import triton
import triton.language as tl

from r1kernels.grpo_loss.triton_terms import add_up, token_loss
from r1kernels.logprob_entropy.triton_rows import (
    FORBIDDEN,
    far,
    label_logit,
    load_logits,
    local_label,
    row_gradient,
    row_scale,
    row_sums,
    store_row,
)

# Of these a program reads or writes one number a row: whether they are aligned is no matter.
ROWS = ["labels_ptr", "temperature_ptr", "old_logp_ptr", "advantage_ptr", "weight_ptr", "ref_logp_ptr"]
ROWS += ["rollout_logp_ptr", "logp_ptr", "entropy_ptr"]


@triton.jit
def _of_row(ptr, row, used):
    """A row's float; 0 where the row is not used and where there is no tensor."""
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + row, mask=used, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_inner", "num_rows"], do_not_specialize_on_alignment=ROWS)
def logits_grpo_kernel(
    logits_ptr,  # [outer, inner, V] bf16, f16 or f32
    stride_outer,
    stride_inner,
    stride_column,
    num_inner,
    vocab,
    labels_ptr,  # [N] i64
    temperature_ptr,  # [N] f32, or None
    scale,
    softcap,
    pre_scale,
    old_logp_ptr,  # [N] float, or None
    advantage_ptr,  # [N] float
    weight_ptr,  # [N] float; rows of weight 0 are not read
    ref_logp_ptr,  # [N] float, or None
    rollout_logp_ptr,  # [N] float, or None
    logp_ptr,  # [N] f32, out
    entropy_ptr,  # [N] f32, out
    out_ptr,  # [outer, inner, V] like logits, may be them; None: no gradient; out
    out_outer,
    out_inner,
    out_column,
    partial_ptr,  # [programs, NUM_SUMS] f32, scratch
    counter_ptr,  # [1] i32, scratch
    loss_ptr,  # [1] f32, out
    metrics_ptr,  # [NUM_SUMS - 1] f32, out
    num_rows,
    clip_low,
    clip_high,
    dual_clip,
    sapo_tau,
    sapo_tau_negative,
    kl_coef,
    entropy_coef,
    tis_low,
    tis_high,
    SOFTCAP: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    LOSS: tl.constexpr,
    KL: tl.constexpr,
    KL_GRAD: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    TIS: tl.constexpr,
    REPEAT: tl.constexpr,
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = REPEAT * THREADS * WIDTH
    zero = tl.zeros((), tl.float32)
    t0, t1, t2, t3, t4, t5, t6, t7 = zero, zero, zero, zero, zero, zero, zero, zero
    for number in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.zeros((), tl.int64) + number
        row_ptr = logits_ptr + (row // num_inner) * stride_outer + (row % num_inner) * stride_inner
        weight = tl.load(weight_ptr + row).to(tl.float32)
        used = weight != 0.0
        num_read = tl.where(used, tl.zeros((), tl.int32) + vocab, 0)
        label = local_label(labels_ptr, row, 0, vocab)
        to_z = row_scale(temperature_ptr, scale, row)
        picked = label_logit(row_ptr, label, stride_column, used & (label >= 0), pre_scale, softcap, SOFTCAP) * to_z
        highest, total, weighted, _, _ = row_sums(
            row_ptr,
            stride_column,
            vocab,
            label,
            num_read,
            to_z,
            softcap,
            pre_scale,
            None,
            0,
            0,
            SOFTCAP,
            True,
            False,
            REPEAT,
            THREADS,
            WIDTH,
            "evict_last",
        )
        # No distribution, or no label: NaN, as nobody looks at values on the way to the GPU.
        top = highest * to_z
        log_total = tl.where((highest > FORBIDDEN) & (label >= 0), tl.log(total), float("nan"))
        logp = tl.where(used, picked - top - log_total, 0.0)
        entropy = tl.where(used, log_total - weighted / total, 0.0)
        tl.store(logp_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)

        old_logp = logp
        if old_logp_ptr is not None:
            old_logp = _of_row(old_logp_ptr, row, used)
        slope, kl_slope, u0, u1, u2, u3, u4, u5, u6, u7 = token_loss(
            logp,
            logp - old_logp,
            _of_row(ref_logp_ptr, row, used) - logp,
            old_logp - _of_row(rollout_logp_ptr, row, used),
            _of_row(advantage_ptr, row, used),
            weight,
            entropy if ENTROPY_GRAD else 0.0,
            clip_low,
            clip_high,
            dual_clip,
            sapo_tau,
            sapo_tau_negative,
            kl_coef,
            entropy_coef,
            tis_low,
            tis_high,
            LOSS,
            KL,
            KL_GRAD,
            KL_IMPORTANCE,
            TIS,
        )
        t0, t1, t2, t3 = t0 + u0, t1 + u1, t2 + u2, t3 + u3
        t4, t5, t6, t7 = t4 + u4, t5 + u5, t6 + u6, t7 + u7

        if out_ptr is not None:
            tl.debug_barrier()  # every thread has read its part of the row, the label's logit too: it may be written
            grad_ptr = out_ptr + (row // num_inner) * out_outer + (row % num_inner) * out_inner
            to_logp = (slope + kl_slope) * to_z
            to_entropy = -entropy_coef * weight * to_z
            of_p = -to_logp
            if ENTROPY_GRAD:
                of_p -= to_entropy * (entropy - log_total)
            for start in range(0, num_read, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < vocab
                x = load_logits(row_ptr, column, inside, stride_column, pre_scale, softcap, SOFTCAP, "evict_first")
                grad = row_gradient(
                    x,
                    column,
                    label,
                    to_z,
                    softcap,
                    pre_scale,
                    top,
                    log_total,
                    to_logp,
                    of_p,
                    to_entropy,
                    SOFTCAP,
                    ENTROPY_GRAD,
                )
                store_row(grad_ptr, column, out_column, grad, inside)
            for start in range(num_read, vocab, BLOCK):  # a row that is not used
                column = start + tl.arange(0, BLOCK)
                store_row(grad_ptr, column, out_column, tl.zeros((BLOCK,), tl.float32), column < vocab)
    add_up((t0, t1, t2, t3, t4, t5, t6, t7), partial_ptr, counter_ptr, loss_ptr, metrics_ptr, 64)


@triton.jit(do_not_specialize=["num_inner", "num_rows"])
def multiply_kernel(
    grad_ptr,  # [outer, inner, V], in and out
    stride_outer,
    stride_inner,
    stride_column,
    num_inner,
    vocab,
    factor_ptr,  # [1] float
    num_rows,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for number in range(tl.program_id(0), num_rows, tl.num_programs(0)):
            row = tl.zeros((), tl.int64) + number
            row_ptr = grad_ptr + (row // num_inner) * stride_outer + (row % num_inner) * stride_inner
            for start in range(0, vocab, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = column < vocab
                x = tl.load(row_ptr + far(column, stride_column), mask=inside, other=0.0).to(tl.float32)
                store_row(row_ptr, column, stride_column, x * factor, inside)
