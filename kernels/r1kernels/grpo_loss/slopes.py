"""A token-level loss with its slopes, for ops that go on to multiply them: no autograd in between."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1kernels.grpo_loss import GrpoMetrics, check_tensors
from r1kernels.grpo_loss.objective import GrpoObjective

NO_LABEL = -(2**31)  # ignore_index of ops whose rows are left out by their weight and by nothing else


class FusedGrpo(NamedTuple):
    """What `logits_grpo_loss` and `linear_grpo_loss` return."""

    loss: torch.Tensor  # scalar, differentiable
    metrics: GrpoMetrics  # as grpo_loss reports them
    logp: torch.Tensor  # [...] float32, log-probability of each label: the next update's old_logp; no gradient
    entropy: torch.Tensor  # [...] float32 (nats); no gradient


def check_tokens(
    op: str,
    objective: GrpoObjective,
    two_ops: str,
    *,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
) -> dict[str, torch.Tensor | None]:
    """-> the same tensors, flat: [N] each.

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
    given = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    given |= {"advantage": advantage, "loss_weight": loss_weight}
    tensors = {name: None if x is None else x.detach().reshape(-1).contiguous() for name, x in given.items()}
    weights = tensors["loss_weight"]
    check_tensors(op, o, weights, entropy=weights if o.entropy_coef else None, **tensors)
    return tensors


def loss_and_slopes(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    objective: GrpoObjective,
    *,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """-> loss and metrics stacked, d loss / d logp [n], d loss / d entropy [n] or None without entropy_coef."""
    entropy = entropy if objective.entropy_coef else None
    if logp.is_cuda and logp.dtype != torch.float64:
        from r1kernels.grpo_loss.triton_impl import launch

        loss, metrics, to_logp, to_entropy = launch(
            logp,
            old_logp,
            advantage,
            loss_weight,
            objective,
            entropy=entropy,
            ref_logp=ref_logp,
            rollout_logp=rollout_logp,
            cu_seqlens=None,
        )
        return torch.cat([loss[None], metrics]), to_logp, to_entropy
    from r1kernels.grpo_loss.reference import grpo_loss_reference

    inputs = [x.detach().requires_grad_() for x in (logp, entropy) if x is not None]
    with torch.enable_grad():
        loss, metrics = grpo_loss_reference(
            inputs[0],
            old_logp,
            advantage,
            loss_weight,
            objective,
            entropy=inputs[1] if entropy is not None else None,
            ref_logp=ref_logp,
            rollout_logp=rollout_logp,
            cu_seqlens=None,
        )
    grads = torch.autograd.grad(loss, inputs)
    return torch.stack([loss.detach(), *metrics]), grads[0], grads[1] if entropy is not None else None
