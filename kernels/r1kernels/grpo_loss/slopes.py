"""A token-level loss with its slopes, for ops that go on to multiply them: no autograd in between."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1kernels.grpo_loss import GrpoMetrics
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.terms import TokenTerms, check_tensors

NO_LABEL = -(2**31)  # ignore_index of ops whose rows are left out by their weight and by nothing else


class FusedGrpo(NamedTuple):
    """What `logits_grpo_loss` and `linear_grpo_loss` return."""

    loss: torch.Tensor  # scalar, differentiable
    metrics: GrpoMetrics  # as grpo_loss reports them
    logp: torch.Tensor  # [...] float32, log-probability of each label: the next update's old_logp; no gradient
    entropy: torch.Tensor  # [...] float32 (nats); no gradient


def check_tokens(op: str, objective: GrpoObjective, two_ops: str, terms: TokenTerms) -> TokenTerms:
    """-> the same tensors, flat.

    Args:
        two_ops: what to use where the objective does not allow one op, for the message.

    Raises:
        ValueError: they do not fit together or to the objective; or it needs whole sequences.
    """
    o = objective
    if o.needs_sequences:
        raise ValueError(
            f"{op}: ratio_level={o.ratio_level!r} with tis_level={o.tis_level!r} needs the log-probabilities of whole "
            f"sequences before the first gradient; use {two_ops}"
        )
    flat = terms.each(lambda x: x.detach().reshape(-1).contiguous())
    check_tensors(op, o, flat.loss_weight, flat, flat.loss_weight if o.entropy_coef else None)
    return flat


def loss_and_slopes(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    objective: GrpoObjective,
    terms: TokenTerms,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """-> loss and metrics stacked, d loss / d logp [n], d loss / d entropy [n] or None without entropy_coef."""
    wants_entropy = bool(objective.entropy_coef)
    if logp.is_cuda and logp.dtype != torch.float64:
        from r1kernels.grpo_loss.triton_impl import launch

        loss, metrics, to_logp, to_entropy = launch(logp, terms, objective, entropy if wants_entropy else None, None)
        return torch.cat([loss[None], metrics]), to_logp, to_entropy
    from r1kernels.grpo_loss.reference import grpo_loss_reference

    inputs = [x.detach().requires_grad_() for x in ((logp, entropy) if wants_entropy else (logp,))]
    with torch.enable_grad():
        loss, sums = grpo_loss_reference(inputs[0], terms, objective, inputs[1] if wants_entropy else None, None)
    grads = torch.autograd.grad(loss, inputs)
    return torch.stack([loss.detach(), *sums]), grads[0], grads[1] if wants_entropy else None
