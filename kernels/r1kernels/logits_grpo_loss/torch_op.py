"""torch.ops.r1kernels.logits_grpo_loss: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

from typing import Any

import torch

from r1kernels.grpo_loss import GrpoMetrics
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.slopes import FusedGrpo
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.grpo_loss.torch_op import NUM_SUMS, decode, encode
from r1kernels.logits_grpo_loss import logits_grpo_loss
from r1kernels.logprob_entropy.problem import Softmax, wide
from r1kernels.logprob_entropy.torch_op import arguments_of, softmax_of
from r1kernels.tracing import autograd_in_op


@torch.library.custom_op("r1kernels::logits_grpo_loss", mutates_args=())
def loss_and_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    group: str,
    kinds: str,
    bounds: list[float],
    wants_gradient: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss and metrics [8], logp and entropy like labels, d loss / d logits (empty if not wanted)."""
    softmax = softmax_of(temperatures, temperature, logit_scale, softcap, group)
    given: dict[str, Any] = softmax._asdict() | {"ref_logp": ref_logp, "rollout_logp": rollout_logp}
    given |= {"inplace": False, "impl": impl}
    with autograd_in_op():
        x = logits.detach().requires_grad_(wants_gradient)
        found = logits_grpo_loss(x, labels, old_logp, advantage, loss_weight, decode(kinds, bounds), **given)
        grad = torch.autograd.grad(found.loss, x)[0] if wants_gradient else logits.new_empty(0)
    return torch.stack([found.loss.detach(), *found.metrics]), found.logp, found.entropy, grad


@loss_and_gradient.register_fake
def _(logits, labels, *rest):
    *_, wants_gradient, _impl = rest
    dtype = wide(logits.dtype)
    rows = [logits.new_empty(labels.shape, dtype=dtype) for _ in range(2)]
    sums = logits.new_empty(NUM_SUMS, dtype=dtype)
    return sums, *rows, torch.empty_like(logits) if wants_gradient else logits.new_empty(0)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[3])


def _backward(ctx, grad_sums, *_others):
    (grad,) = ctx.saved_tensors
    return (grad * grad_sums[0]).to(grad.dtype), *[None] * 15


loss_and_gradient.register_autograd(_backward, setup_context=_setup)


def traced(
    logits: torch.Tensor,
    labels: torch.Tensor,
    terms: TokenTerms,
    objective: GrpoObjective,
    softmax: Softmax,
    impl: str,
) -> FusedGrpo:
    """`logits_grpo_loss` as one node of a graph. The gradient is always beside the logits."""
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    sums, logp, entropy, _ = loss_and_gradient(
        logits,
        labels,
        *terms,
        *arguments_of(softmax),
        *encode(objective),
        wants_gradient,
        impl,
    )
    return FusedGrpo(sums[0], GrpoMetrics(*sums.detach()[1:].unbind()), logp.detach(), entropy.detach())
