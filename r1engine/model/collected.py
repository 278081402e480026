"""What Megatron's schedule collects of each row: its log-probabilities, its score, or its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from r1engine.batch import PackedBatch, TokenOutputs

# (outputs of a row, row) -> (loss scalar, metrics: sums over the row)
LossFn = Callable[[TokenOutputs, PackedBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def take_logp(outputs: TokenOutputs, row: PackedBatch) -> torch.Tensor:
    """What the schedule collects of a forward-only row."""
    return outputs.logp.contiguous()


def take_score(outputs: TokenOutputs, row: PackedBatch) -> torch.Tensor:
    """The same of a model that ends in a score."""
    assert outputs.score is not None, "Policy.scores: found a head of tokens, required a score"
    return outputs.score.contiguous()


def loss_of_row(
    loss_fn: LossFn, mtp_weight: float, outputs: TokenOutputs, row: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """In Megatron's triple form. A token count of 0 says: the loss is a sum already, divide by nothing.

    The schedule collects the third part; the row's log-probabilities travel in it.
    """
    loss, metrics = loss_fn(outputs._replace(entropy=outputs.entropy.detach()), row)
    metrics = {"loss": loss.detach(), **metrics}
    if outputs.draft_logp is not None:  # DeepSeek-V3, eq. 24-25
        mtp_loss = -(outputs.draft_logp * row.loss_weight).sum()
        metrics["mtp_loss"] = mtp_loss.detach()
        loss = loss + mtp_weight * mtp_loss
    return loss, torch.zeros([], dtype=torch.int, device=loss.device), {**metrics, "logp": outputs.logp.detach()}
