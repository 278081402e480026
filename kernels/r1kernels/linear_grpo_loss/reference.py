"""What linear_grpo_loss means, with the logits whole: the oracle of its tests and the baseline of its benchmark."""

from __future__ import annotations

import torch

from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.reference import grpo_loss_reference
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.linear_logprob.reference import linear_logprob_reference


def linear_grpo_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    objective: GrpoObjective,
    *,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-> the loss and the sums of GrpoMetrics, in the dtype of the inputs, by autograd."""
    logp, entropy = linear_logprob_reference(
        hidden, weight, labels, bias=bias, temperature=temperature, softcap=softcap
    )
    terms = TokenTerms(old_logp, advantage, loss_weight, ref_logp, rollout_logp)
    return grpo_loss_reference(logp, terms, objective, entropy)
