"""The tensors of a token-level loss beside the log-probability itself, and what is required of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from r1kernels.dispatch import check_float, check_same_shape
from r1kernels.grpo_loss.objective import GrpoObjective


class TokenTerms(NamedTuple):
    """What the loss of each token takes beside its log-probability and entropy: [N] each."""

    old_logp: torch.Tensor | None
    advantage: torch.Tensor
    loss_weight: torch.Tensor
    ref_logp: torch.Tensor | None
    rollout_logp: torch.Tensor | None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenTerms:
        """`function` of every tensor that is there."""
        old, ref, rollout = (
            None if x is None else function(x) for x in (self.old_logp, self.ref_logp, self.rollout_logp)
        )
        return TokenTerms(old, function(self.advantage), function(self.loss_weight), ref, rollout)


def check_tensors(
    op: str,
    objective: GrpoObjective,
    logp: torch.Tensor,
    terms: TokenTerms,
    entropy: torch.Tensor | None,
) -> None:
    """Require [T] floats of one device, and the tensors that the objective needs.

    Raises:
        ValueError: naming `op`, the argument, what was found and what is required.
    """
    tensors = {"logp": logp, **terms._asdict(), "entropy": entropy}
    for name in ("logp", "old_logp", "advantage", "loss_weight", "entropy", "ref_logp", "rollout_logp"):
        if (tensor := tensors[name]) is not None:
            check_float(op, name, tensor)
    if logp.dim() != 1:
        raise ValueError(f"{op}: logp must be [T], got {tuple(logp.shape)}")
    check_same_shape(op, ("logp", logp), *tensors.items())
    for option, is_on, name in (
        (f"kl_coef={objective.kl_coef}", objective.kl_coef, "ref_logp"),
        (f"entropy_coef={objective.entropy_coef}", objective.entropy_coef, "entropy"),
        (f"tis={objective.tis!r}", objective.tis != "off", "rollout_logp"),
    ):
        if is_on and tensors[name] is None:
            raise ValueError(f"{op}: {option} needs {name}, got None")
