"""A token-level loss with its slopes, for ops that go on to multiply them: no autograd in between."""

from __future__ import annotations

import torch

from r1kernels.grpo_loss.objective import GrpoObjective


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
    if logp.is_cuda:
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
