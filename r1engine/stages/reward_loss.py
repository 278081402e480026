"""What a reward model is trained on (v2, section 3.1): pairs by the Bradley-Terry likelihood, labels by cross-entropy.

A text is scored at its last token. In a row the texts of a pair stand side by side, the better one first.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, softplus

from r1engine.batch import PackedBatch, TokenOutputs

LossAndSums = tuple[torch.Tensor, dict[str, torch.Tensor]]


def of_texts(values: torch.Tensor, row: PackedBatch) -> torch.Tensor:
    """[S] from [T]: of the last token of each sequence, which is the whole text's."""
    return values[row.cu_seqlens[1:].long() - 1]


def pairwise(outputs: TokenOutputs, row: PackedBatch, *, margin: float = 0.0, center: float = 0.0) -> LossAndSums:
    """Mean over the pairs of -log sigmoid(s_chosen - s_rejected - margin delta) + center (s_chosen + s_rejected)^2.

    Deviation from the paper, which names no more than the loss: the last term keeps the scores around 0 (arXiv
    2312.09244); it is off unless asked for.

    Args:
        outputs: of a policy with a score; it is differentiable.
        row:     loss_weight is 1 / (pairs of the batch), advantage is the pair's delta.
        margin:  factor on delta.
        center:  coefficient of the last term.

    Returns:
        The row's part of the loss, and of the means of: accuracy (a tie counts half), difference, chosen, rejected.
    """
    assert outputs.score is not None
    texts = row.cu_seqlens.numel() - 1
    whole = texts - texts % 2  # padding has weight 0 and stands behind the pairs
    score, weight, delta = (
        of_texts(values, row)[:whole].view(-1, 2) for values in (outputs.score, row.loss_weight, row.advantage)
    )
    chosen, rejected = score.unbind(1)
    of_pair, difference = weight[:, 0], chosen - rejected
    losses = center * (chosen + rejected) ** 2 - logsigmoid(difference - margin * delta[:, 0])
    with torch.no_grad():
        right = (difference > 0).float() + 0.5 * (difference == 0)
        means = {"accuracy": right, "difference": difference, "chosen": chosen, "rejected": rejected}
        sums = {name: (of_pair * values).sum() for name, values in means.items()}
    return (of_pair * losses).sum(), sums


def pointwise(outputs: TokenOutputs, row: PackedBatch) -> LossAndSums:
    """Mean over the texts of the cross-entropy of their labels: softplus((1 - 2 y) s), y = 1 where it is safe.

    Args:
        outputs: of a policy with a score; it is differentiable.
        row:     loss_weight is 1 / (texts of the batch), advantage is y.

    Returns:
        The row's part of the loss, and of the means of: accuracy (a score of 0 counts half) and score.
    """
    assert outputs.score is not None
    score, weight, label = (of_texts(values, row) for values in (outputs.score, row.loss_weight, row.advantage))
    sign = 2 * label - 1
    with torch.no_grad():
        right = (sign * score > 0).float() + 0.5 * (score == 0)
        sums = {"accuracy": right, "score": score}
        sums = {name: (weight * values).sum() for name, values in sums.items()}
    return (weight * softplus(-sign * score)).sum(), sums
