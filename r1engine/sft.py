"""Supervised steps: next-token cross-entropy on (prompt, completion) texts, through the same policy as RL."""

from __future__ import annotations

import torch

from r1engine.batch import PackedBatch, Sequence, pack_sequences
from r1engine.model.policy import Policy


def cross_entropy(
    logp: torch.Tensor, entropy: torch.Tensor, row: PackedBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood of one packed row.

    Args:
        logp:    [T] float32, differentiable.
        entropy: [T] float32.
        row:     its loss_weight is 1 / (weighted tokens of the batch) on the completions.

    Returns:
        The loss, and the weighted sum of the entropy.
    """
    return -(row.loss_weight * logp).sum(), {"entropy": (row.loss_weight * entropy).sum()}


def supervised_step(
    policy: Policy, texts: list[tuple[list[int], list[int]]], *, max_tokens: int, lr: float
) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy of all completion tokens.

    Args:
        policy:     the model.
        texts:      (prompt tokens, completion tokens), the same on every rank.
        max_tokens: of a packed row.
        lr:         learning rate.

    Returns:
        loss (nats a token), entropy and grad_norm.
    """
    num_tokens = sum(len(completion) for _, completion in texts)
    sequences = [Sequence(prompt + completion, len(prompt), 1.0 / num_tokens) for prompt, completion in texts]
    world = policy.world
    shards = pack_sequences(
        sequences,
        max_tokens=max_tokens,
        shards=world.dp_size,
        multiple=policy.row_multiple,
        num_rows_multiple=policy.num_rows_multiple,
    )
    return policy.update([row.to(world.device) for row in shards[world.dp_rank]], cross_entropy, lr)
