"""torch.ops.r1kernels.grpo_loss: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

import math
from typing import Any

import torch

from r1kernels.grpo_loss import GrpoMetrics, grpo_loss
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.tracing import autograd_in_op

NUM_SUMS = 1 + len(GrpoMetrics._fields)


@torch.library.custom_op("r1kernels::grpo_loss", mutates_args=())
def loss_and_slopes(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    kinds: str,
    bounds: list[float],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss and metrics [8], d loss / d logp [T], d loss / d entropy [T] (empty without entropy). See `encode`."""
    given: dict[str, Any] = {"ref_logp": ref_logp, "rollout_logp": rollout_logp, "cu_seqlens": cu_seqlens, "impl": impl}
    with autograd_in_op():
        inputs = [x.detach().requires_grad_() for x in (logp, entropy) if x is not None]
        given["entropy"] = inputs[1] if len(inputs) > 1 else None
        loss, metrics = grpo_loss(inputs[0], old_logp, advantage, loss_weight, decode(kinds, bounds), **given)
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    slope = grads[1] if len(inputs) > 1 else logp.new_empty(0)
    return torch.stack([loss.detach(), *metrics]), grads[0], slope


@loss_and_slopes.register_fake
def _(logp, entropy, old_logp, advantage, loss_weight, ref_logp, rollout_logp, cu_seqlens, kinds, bounds, impl):
    sums = logp.new_empty(NUM_SUMS, dtype=torch.float32 if impl == "triton" else logp.dtype)
    return sums, logp.new_empty(logp.shape), logp.new_empty(0) if entropy is None else entropy.new_empty(entropy.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad_sums, _to_logp, _to_entropy):
    to_logp, to_entropy = ctx.saved_tensors
    return (
        (to_logp * grad_sums[0]).to(to_logp.dtype),
        (to_entropy * grad_sums[0]).to(to_entropy.dtype) if ctx.needs_input_grad[1] else None,
        *[None] * 9,
    )


loss_and_slopes.register_autograd(_backward, setup_context=_setup)


def traced(
    logp: torch.Tensor,
    terms: TokenTerms,
    objective: GrpoObjective,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, GrpoMetrics]:
    """`grpo_loss` as one node of a graph."""
    sums, _, _ = loss_and_slopes(logp, entropy, *terms, cu_seqlens, *encode(objective), impl)
    return sums[0], GrpoMetrics(*sums.detach()[1:].unbind())


def encode(objective: GrpoObjective) -> tuple[str, list[float]]:
    """What an op can be told of an objective: its kinds, by commas, and its numbers."""
    o = objective
    kinds = (o.loss, o.ratio_level, o.kl, o.kl_grad or o.kl, str(o.kl_importance), o.tis, o.tis_level)
    dual_clip = math.inf if o.dual_clip is None else o.dual_clip
    bounds = [o.clip_eps, o.clip_high, dual_clip, o.sapo_tau, o.sapo_tau_negative, o.kl_coef, o.entropy_coef]
    return ",".join(kinds), [*bounds, o.tis_low, o.tis_high]


def decode(kinds: str, bounds: list[float]) -> GrpoObjective:
    """The objective of `encode`."""
    loss, ratio_level, kl, kl_grad, kl_importance, tis, tis_level = kinds.split(",")
    clip_eps, clip_high, dual_clip, tau, tau_negative, kl_coef, entropy_coef, tis_low, tis_high = bounds
    fields: dict[str, Any] = {"loss": loss, "ratio_level": ratio_level, "kl": kl, "kl_grad": kl_grad}
    fields |= {"kl_importance": kl_importance == "True", "tis": tis, "tis_level": tis_level}
    fields |= {"clip_eps": clip_eps, "clip_eps_high": clip_high}
    fields |= {"dual_clip": None if dual_clip == math.inf else dual_clip, "sapo_tau": tau}
    fields |= {"sapo_tau_negative": tau_negative, "kl_coef": kl_coef, "entropy_coef": entropy_coef}
    return GrpoObjective(**fields, tis_low=tis_low, tis_high=tis_high)
