"""grpo_loss in one launch: loss, gradients and metrics."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.grpo_loss.triton_terms import NUM_SUMS, add_up, token_loss

BLOCK = 1024  # tokens that a program handles at once
MAX_FLOAT = torch.finfo(torch.float32).max  # unlike infinity, times an advantage of 0 it is 0


@triton.jit
def _load(ptr, offsets, end, is_full):
    """f32 tile, 0 from `end` on and where there is no tensor. A full tile needs no mask, and gets 128-bit loads."""
    if ptr is None:
        return tl.zeros(offsets.shape, tl.float32)
    else:
        if is_full:
            x = tl.load(ptr + offsets)
        else:
            x = tl.load(ptr + offsets, mask=offsets < end, other=0.0)
        return x.to(tl.float32)


@triton.jit
def _load_used(ptr, offsets, end, is_full, used):
    """`_load`, 0 where not used, whatever lies there."""
    return tl.where(used, _load(ptr, offsets, end, is_full), 0.0)


@triton.jit
def _store(ptr, offsets, values, end, is_full):
    if is_full:
        tl.store(ptr + offsets, values)
    else:
        tl.store(ptr + offsets, values, mask=offsets < end)


@triton.jit
def _log_ratios(logp_ptr, old_logp_ptr, ref_logp_ptr, rollout_logp_ptr, offsets, end, is_full, used):
    """-> logp, logp - old_logp, ref_logp - logp, old_logp - rollout_logp; without old_logp it is logp itself."""
    logp = _load_used(logp_ptr, offsets, end, is_full, used)
    old_logp = logp
    if old_logp_ptr is not None:
        old_logp = _load_used(old_logp_ptr, offsets, end, is_full, used)
    log_ref = _load_used(ref_logp_ptr, offsets, end, is_full, used) - logp
    return logp, logp - old_logp, log_ref, old_logp - _load_used(rollout_logp_ptr, offsets, end, is_full, used)


@triton.jit(do_not_specialize=["num_tokens"])
def grpo_kernel(
    logp_ptr,  # [T] float
    old_logp_ptr,  # [T] float or None
    advantage_ptr,  # [T] float
    weight_ptr,  # [T] float
    ref_logp_ptr,  # [T] float or None
    rollout_logp_ptr,  # [T] float or None
    entropy_ptr,  # [T] float or None
    cu_seqlens_ptr,  # [programs + 1] int or None: program p has tokens p * BLOCK ..
    grad_ptr,  # [T] f32, out: d loss / d logp
    grad_entropy_ptr,  # [T] f32 or None, out
    partial_ptr,  # [programs, NUM_SUMS] f32, scratch
    counter_ptr,  # [1] i32, scratch
    loss_ptr,  # [1] f32, out
    metrics_ptr,  # [NUM_SUMS - 1] f32, out
    num_tokens,
    clip_low,
    clip_high,
    dual_clip,
    sapo_tau,
    sapo_tau_negative,
    kl_coef,
    entropy_coef,
    tis_low,
    tis_high,
    LOSS: tl.constexpr,
    RATIO_LEVEL: tl.constexpr,
    KL: tl.constexpr,
    KL_GRAD: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    TIS: tl.constexpr,
    TIS_LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has BLOCK tokens, or one sequence of any length, of which it makes up to three sweeps through L1/L2."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    if cu_seqlens_ptr is None:
        start = program.to(tl.int64) * BLOCK
        end = tl.minimum(start + BLOCK, num_tokens)
        ratio_of_all, ref_of_all, tis_of_all, count = 0.0, 0.0, 0.0, 1.0
    else:
        start = tl.load(cu_seqlens_ptr + program).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + program + 1).to(tl.int64)
        ratio_sum, ref_sum, tis_sum, used_sum = zero, zero, zero, zero
        for first in range(start, end, BLOCK):
            offsets = first + lanes
            is_full = first + BLOCK <= end
            used = _load(weight_ptr, offsets, end, is_full) != 0.0
            _, log_ratio, log_ref, log_tis = _log_ratios(
                logp_ptr, old_logp_ptr, ref_logp_ptr, rollout_logp_ptr, offsets, end, is_full, used
            )
            ratio_sum += log_ratio
            ref_sum += log_ref
            tis_sum += log_tis
            used_sum += used.to(tl.float32)
        count = tl.maximum(tl.sum(used_sum), 1.0)
        ratio_of_all, ref_of_all, tis_of_all = tl.sum(ratio_sum), tl.sum(ref_sum), tl.sum(tis_sum)
        if RATIO_LEVEL == "sequence_mean":
            ratio_of_all = ratio_of_all / count
        if TIS_LEVEL == "sequence_mean":
            tis_of_all = tis_of_all / count

    shared = zero
    t0, t1, t2, t3, t4, t5, t6, t7 = zero, zero, zero, zero, zero, zero, zero, zero
    for first in range(start, end, BLOCK):
        offsets = first + lanes
        is_full = first + BLOCK <= end
        weight = _load(weight_ptr, offsets, end, is_full)
        used = weight != 0.0
        logp, log_ratio, log_ref, log_tis = _log_ratios(
            logp_ptr, old_logp_ptr, ref_logp_ptr, rollout_logp_ptr, offsets, end, is_full, used
        )
        if RATIO_LEVEL != "token":
            log_ratio = zero + ratio_of_all
        if RATIO_LEVEL == "sequence":
            log_ref = zero + ref_of_all
        if TIS_LEVEL != "token":
            log_tis = zero + tis_of_all
        slope, kl_slope, u0, u1, u2, u3, u4, u5, u6, u7 = token_loss(
            logp,
            log_ratio,
            log_ref,
            log_tis,
            _load_used(advantage_ptr, offsets, end, is_full, used),
            weight,
            _load_used(entropy_ptr, offsets, end, is_full, used),
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
        # What a token's logp changes alone is stored now; what it changes through its sequence's sums is gathered.
        own = zero
        if RATIO_LEVEL == "token" or LOSS == "cispo":
            own += slope
        elif RATIO_LEVEL == "sequence_mean":
            shared += slope / count
        else:
            shared += slope
        if RATIO_LEVEL == "sequence":
            shared += kl_slope
        else:
            own += kl_slope
        _store(grad_ptr, offsets, own, end, is_full)
        if grad_entropy_ptr is not None:
            _store(grad_entropy_ptr, offsets, -entropy_coef * weight, end, is_full)
        t0, t1, t2, t3 = t0 + u0, t1 + u1, t2 + u2, t3 + u3
        t4, t5, t6, t7 = t4 + u4, t5 + u5, t6 + u6, t7 + u7

    if RATIO_LEVEL != "token":
        through_sequence = tl.sum(shared)
        tl.debug_barrier()  # the stores above are read back
        for first in range(start, end, BLOCK):
            offsets = first + lanes
            inside = offsets < end
            used = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32) != 0.0
            own = tl.load(grad_ptr + offsets, mask=used, other=0.0)
            tl.store(grad_ptr + offsets, tl.where(used, own + through_sequence, 0.0), mask=inside)

    sums = (tl.sum(t0), tl.sum(t1), tl.sum(t2), tl.sum(t3), tl.sum(t4), tl.sum(t5), tl.sum(t6), tl.sum(t7))
    add_up(sums, partial_ptr, counter_ptr, loss_ptr, metrics_ptr, 64)


@cache
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    """Arrivals of a launch's programs; each launch leaves 0. One a stream, as launches of a stream do not overlap."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def counter(device: torch.device) -> torch.Tensor:
    """The [1] int32 counter of `add_up` for launches on the current stream of a device."""
    return _counter(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


def scalars(objective: GrpoObjective) -> dict[str, float]:
    """The run-time arguments clip_low .. tis_high of `token_loss`."""
    o = objective
    return {
        "clip_low": o.clip_eps,
        "clip_high": o.clip_high,
        "dual_clip": MAX_FLOAT if o.dual_clip is None else o.dual_clip,
        "sapo_tau": o.sapo_tau,
        "sapo_tau_negative": o.sapo_tau_negative,
        "kl_coef": o.kl_coef,
        "entropy_coef": o.entropy_coef,
        "tis_low": o.tis_low,
        "tis_high": o.tis_high,
    }


def launch(
    logp: torch.Tensor,
    terms: TokenTerms,
    objective: GrpoObjective,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """-> loss [], metrics [NUM_SUMS - 1], d loss / d logp [T], d loss / d entropy [T] or None; all float32."""
    o, num_tokens = objective, logp.numel()
    cu_seqlens = cu_seqlens if o.needs_sequences else None
    programs = triton.cdiv(num_tokens, BLOCK) if cu_seqlens is None else cu_seqlens.numel() - 1
    new = logp.new_empty
    metrics, grad = new(NUM_SUMS - 1, dtype=torch.float32), new(num_tokens, dtype=torch.float32)
    grad_entropy = torch.empty_like(grad) if entropy is not None and o.entropy_coef else None
    loss = new((), dtype=torch.float32)
    if not num_tokens:
        return loss.zero_(), metrics.zero_(), grad, grad_entropy
    with torch.cuda.device_of(logp):
        grpo_kernel[(programs,)](
            logp,
            terms.old_logp,
            terms.advantage,
            terms.loss_weight,
            terms.ref_logp,
            terms.rollout_logp if o.tis != "off" else None,
            entropy if o.entropy_coef else None,
            cu_seqlens,
            grad,
            grad_entropy,
            new((programs, NUM_SUMS), dtype=torch.float32),
            counter(logp.device),
            loss,
            metrics,
            num_tokens,
            **scalars(o),
            LOSS=o.loss,
            RATIO_LEVEL=o.ratio_level,
            KL="off" if terms.ref_logp is None else o.kl,
            KL_GRAD=o.kl_grad or o.kl,
            KL_IMPORTANCE=o.kl_importance,
            TIS=o.tis,
            TIS_LEVEL=o.tis_level if o.tis != "off" else "token",
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return loss, metrics, grad, grad_entropy


class GrpoLoss(torch.autograd.Function):
    """`launch` with its gradients handed to autograd: the backward pass is one multiplication."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: torch.Tensor,
        entropy: torch.Tensor | None,
        terms: TokenTerms,
        objective: GrpoObjective,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, metrics, grad, grad_entropy = launch(logp, terms, objective, entropy, cu_seqlens)
        ctx.save_for_backward(grad, grad_entropy)
        ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_metrics: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, grad_entropy = ctx.saved_tensors
        logp_dtype, entropy_dtype = ctx.dtypes
        through_entropy = None if grad_entropy is None else (grad_entropy * grad_loss).to(entropy_dtype)
        return (grad * grad_loss).to(logp_dtype), through_entropy, None, None, None
