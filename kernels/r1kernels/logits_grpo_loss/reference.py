"""logits_grpo_loss from the parts of logprob_entropy and grpo_loss: sums of all rows, then all gradients.

In PyTorch this is the meaning; a block of rows at a time, so that nothing of the logits' size is made.
"""

from __future__ import annotations

from types import ModuleType

import torch

from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.slopes import TokenTerms, loss_and_slopes
from r1kernels.logprob_entropy import reference
from r1kernels.logprob_entropy.problem import Problem


def loss_and_gradient(
    problem: Problem,
    objective: GrpoObjective,
    terms: TokenTerms,
    out: torch.Tensor | None,
    logprob: ModuleType = reference,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss and metrics stacked, logp [N], entropy [N]; the loss's gradient is written to `out`.

    Args:
        terms:   as `loss_and_slopes` takes them.
        out:     shaped as problem.logits, or these, or None where no gradient is wanted.
        logprob: the implementation of logprob_entropy to use.
    """
    parts = logprob.partials(problem, entropy=True, squares=False)
    rows = logprob.merge(problem, problem.gather(parts))
    sums, to_logp, to_entropy = loss_and_slopes(rows.logp, rows.entropy, objective, terms)
    if out is not None:
        logprob.gradient(problem, rows, to_logp, to_entropy, out)
    return sums, rows.logp, rows.entropy


def multiply(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad *= factor, a scalar; without a pass over `grad` where it is 1."""
    if grad.is_cuda or factor != 1:  # on a GPU to look at it would wait for the device
        grad.mul_(factor)
