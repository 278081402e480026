"""The terms of the GRPO loss on tiles in registers, for this op's kernel and for those that fuse it with others."""

from __future__ import annotations

import triton
import triton.language as tl

NUM_SUMS = 8  # loss, then the fields of GrpoMetrics
MAX_LOG_RATIO = tl.constexpr(20.0)  # as in reference.py


@triton.jit
def bounded_exp(log_ratio):
    """-> exp, log-ratio cut off at MAX_LOG_RATIO, and whether a gradient flows."""
    bounded = tl.minimum(log_ratio, MAX_LOG_RATIO)
    return tl.exp(bounded), bounded, log_ratio <= MAX_LOG_RATIO


@triton.jit
def k3(d, exp_d):
    """exp(d) - d - 1; near 0, where that loses every digit in float32, by its series."""
    series = 0.5 * d * d * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
    return tl.where(tl.abs(d) < 0.25, series, exp_d - d - 1.0)


@triton.jit
def policy_term(
    log_ratio, logp, advantage, clip_low, clip_high, dual_clip, sapo_tau, sapo_tau_negative, LOSS: tl.constexpr
):
    """-> policy loss, its slope in log_ratio (cispo: in logp), is_cut_low, is_cut_high, ratio, drift of the policy."""
    ratio, bounded, flows = bounded_exp(log_ratio)
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    if LOSS == "clip":
        gain = ratio * advantage
        is_cut = clipped * advantage < gain
        is_floored = (advantage < 0.0) & (tl.minimum(gain, clipped * advantage) < dual_clip * advantage)
        loss = -tl.where(is_floored, dual_clip * advantage, tl.minimum(gain, clipped * advantage))
        slope = tl.where(is_cut | is_floored | (log_ratio > MAX_LOG_RATIO), 0.0, -gain)
        cut_low, cut_high = is_cut & (advantage < 0.0), (is_cut & (advantage > 0.0)) | is_floored
    elif LOSS == "cispo":
        slope = -clipped * advantage
        loss = slope * logp
        cut_low, cut_high = clipped > ratio, clipped < ratio
    else:
        tau = tl.where(advantage < 0.0, sapo_tau_negative, sapo_tau)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -4.0 / tau * gate * advantage
        slope = tl.where(flows, -4.0 * gate * (1.0 - gate) * advantage * ratio, 0.0)
        cut_low, cut_high = ratio < 0.0, ratio < 0.0
    return loss, slope, cut_low, cut_high, ratio, k3(bounded, ratio)


@triton.jit
def kl_term(d, KL: tl.constexpr, KL_GRAD: tl.constexpr):
    """d = ref_logp - logp -> estimate KL of the divergence, and the slope of estimate KL_GRAD in logp."""
    ref_ratio, bounded, flows = bounded_exp(d)
    if KL == "k1":
        value = -d
    elif KL == "k2":
        value = 0.5 * d * d
    elif KL == "k3":
        value = k3(bounded, ref_ratio)
    else:
        value = tl.abs(d)
    if KL_GRAD == "k1":
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif KL_GRAD == "k2":
        slope = -d
    elif KL_GRAD == "k3":
        slope = tl.where(flows, 1.0 - ref_ratio, 0.0)
    else:
        slope = tl.where(d > 0.0, -1.0, tl.where(d < 0.0, 1.0, 0.0))
    return value, slope


@triton.jit
def tis_term(log_tis, tis_low, tis_high, TIS: tl.constexpr):
    """log(pi_old / pi_rollout) -> importance weight, and whether the bounds changed it."""
    value, _, _ = bounded_exp(log_tis)
    is_off = (value < tis_low) | (value > tis_high)
    if TIS == "truncate":
        weight = tl.minimum(tl.maximum(value, tis_low), tis_high)
    else:
        weight = tl.where(is_off, 0.0, value)
    return weight, is_off


@triton.jit
def token_loss(
    logp,  # f32 tiles of one shape, 0 where weight is 0
    log_ratio,  # logp - old_logp, or that of the sequence
    log_ref,  # ref_logp - logp, or that of the sequence
    log_tis,  # old_logp - rollout_logp, or that of the sequence
    advantage,
    weight,
    entropy,
    clip_low,
    clip_high,
    dual_clip,  # the largest float: off
    sapo_tau,
    sapo_tau_negative,
    kl_coef,
    entropy_coef,
    tis_low,
    tis_high,
    LOSS: tl.constexpr,
    KL: tl.constexpr,  # "off": there is no ref_logp
    KL_GRAD: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    TIS: tl.constexpr,
):
    """The weighted terms of GrpoObjective.

    -> slope of the policy term in log_ratio (cispo: in logp), slope of the KL term in logp, and the NUM_SUMS terms
    to be added up: loss, then the fields of GrpoMetrics. The slope in entropy is -entropy_coef * weight.
    """
    policy, slope, cut_low, cut_high, ratio, drift = policy_term(
        log_ratio, logp, advantage, clip_low, clip_high, dual_clip, sapo_tau, sapo_tau_negative, LOSS
    )
    zero = tl.zeros(weight.shape, tl.float32)
    tis, tis_off = zero + 1.0, zero
    if TIS != "off":
        tis, is_off = tis_term(log_tis, tis_low, tis_high, TIS)
        policy, slope = policy * tis, slope * tis
        tis_off = tl.where(is_off, weight, 0.0)
    kl, kl_slope = zero, zero
    if KL != "off":
        kl, kl_slope = kl_term(log_ref, KL, KL_GRAD)
        if KL_IMPORTANCE:
            # d (ratio * kl) = ratio * (kl + kl'), as d ratio = ratio * d logp up to the cut-off.
            kl_slope = ratio * (kl_slope + tl.where(log_ratio <= MAX_LOG_RATIO, kl, 0.0))
            kl = ratio * kl
    # kl_coef = 0 only reports the KL, be it infinite.
    kl_loss = tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
    kl_slope = tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
    return (
        weight * slope,
        weight * kl_slope,
        weight * (policy + kl_loss - entropy_coef * entropy),
        weight * kl,
        tl.where(cut_low | cut_high, weight, 0.0),
        tl.where(cut_low, weight, 0.0),
        weight * ratio,
        weight * drift,
        weight * tis,
        tis_off,
    )


@triton.jit
def add_up(
    sums,  # NUM_SUMS scalars of this program
    partial_ptr,  # [programs, NUM_SUMS] f32, scratch
    counter_ptr,  # [1] i32, 0 before and after
    loss_ptr,  # [1] f32, out
    metrics_ptr,  # [NUM_SUMS - 1] f32, out
    ROWS: tl.constexpr,
):
    """Adds the programs' sums in program order, whichever comes last: the same bits in every run, one launch."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(8):
        tl.store(partial_ptr + program * 8 + i, sums[i])
    tl.debug_barrier()  # every thread's store is before the counter's release
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if arrived == programs - 1:
        columns = tl.arange(0, 8)
        total = tl.zeros([8], tl.float32)
        for first in range(0, programs, ROWS):
            rows = first + tl.arange(0, ROWS)
            offsets = rows[:, None] * 8 + columns[None, :]
            tile = tl.load(partial_ptr + offsets, mask=(rows < programs)[:, None], other=0.0, cache_modifier=".cg")
            total += tl.sum(tile, axis=0)
        tl.store(loss_ptr + columns, total, mask=columns == 0)
        tl.store(metrics_ptr + columns - 1, total, mask=columns > 0)
        tl.store(counter_ptr, 0)
