"""What a process reward model is trained on: the score at a step's last token against the step's label."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from r1engine.batch import PackedBatch, TokenOutputs

LossAndSums = tuple[torch.Tensor, dict[str, torch.Tensor]]


def cross_entropy_of_steps(outputs: TokenOutputs, row: PackedBatch) -> LossAndSums:
    """sum_t w_t (softplus(z_t) - y_t z_t): cross-entropy of the probability sigmoid(z) with the label y in [0, 1].

    Entry t of the scores is of the sequence up to and with token t, so it is read at the step's last token itself.

    Args:
        outputs: of a policy with a score; it is differentiable.
        row:     loss_weight is w, 0 but at the last tokens of labelled steps, where advantage is y.

    Returns:
        The row's part of the loss, and of the weighted means of: accuracy at 0.5 (a score of 0 counts half, a label is
        right from 0.5 on), and the probability of right and of wrong steps, as sums with their weights.
    """
    assert outputs.score is not None
    z, y, w = outputs.score, row.advantage, row.loss_weight
    return (w * (softplus(z) - y * z)).sum(), _sums(z, y, w)


def squared_error_of_steps(outputs: TokenOutputs, row: PackedBatch) -> LossAndSums:
    """sum_t w_t (sigmoid(z_t) - y_t)^2; arguments and sums as of `cross_entropy_of_steps`."""
    assert outputs.score is not None
    z, y, w = outputs.score, row.advantage, row.loss_weight
    return (w * (torch.sigmoid(z) - y) ** 2).sum(), _sums(z, y, w)


@torch.no_grad()
def _sums(z: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    is_right = (y >= 0.5).float()
    right = (z * (2 * is_right - 1) > 0).float() + 0.5 * (z == 0)
    p = torch.sigmoid(z)
    return {
        "accuracy": (w * right).sum(),
        "score_right": (w * is_right * p).sum(),
        "share_right": (w * is_right).sum(),
        "score_wrong": (w * (1 - is_right) * p).sum(),
    }
