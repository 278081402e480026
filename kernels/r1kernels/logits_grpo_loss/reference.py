"""logits_grpo_loss from the parts of logprob_entropy and grpo_loss: sums of all rows, then all gradients.

In PyTorch this is the meaning; a block of rows at a time, so that nothing of the logits' size is made.
"""

from __future__ import annotations

import torch

from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.slopes import loss_and_slopes
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.logprob_entropy.problem import Logprob, Problem


def loss_and_gradient(
    logprob: Logprob, problem: Problem, objective: GrpoObjective, terms: TokenTerms, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the package's `loss_and_gradient`."""
    parts = logprob.partials(problem, entropy=True, squares=False)
    rows = logprob.merge(problem, problem.gather(parts))
    sums, to_logp, to_entropy = loss_and_slopes(rows.logp, rows.entropy, objective, terms)
    if out is not None:
        logprob.gradient(problem, rows, to_logp, to_entropy, out)
    return sums, rows.logp, rows.entropy
