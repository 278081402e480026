"""Tokens to the ranks that hold their experts, and back. A token goes to a rank once, however many of its experts
live there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all


class Journey(NamedTuple):
    """Where the rows of a dispatch came from."""

    group: dist.ProcessGroup
    tokens: torch.Tensor  # [rows sent] int64, local token of each row sent, rank after rank
    sent: list[int]  # rows sent to each rank
    received: list[int]  # rows received from each rank


def dispatch(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts_per_rank: int, group: dist.ProcessGroup
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Journey]:
    """Send every token to the ranks of its experts.

    Args:
        x:       [T, D], differentiable.
        ids:     [T, K] int32, expert of the whole model.
        weights: [T, K] float32, differentiable.

    Returns:
        (x [R, D], ids [R, K] int32: local expert, or -1 where the choice is another rank's, weights [R, K]) of the R
        tokens received, ordered by source rank and token; and the way back.
    """
    ranks = torch.arange(group.size(), device=ids.device)
    rank_of = ids // experts_per_rank  # [T, K]
    goes = (rank_of[None] == ranks[:, None, None]).any(-1)  # [ranks, T]
    destination, tokens = goes.nonzero(as_tuple=True)
    sent = goes.sum(1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    sent, received = torch.stack([sent, received]).tolist()  # the one host sync; split sizes are host numbers
    is_there = rank_of[tokens] == destination[:, None]
    local = torch.where(is_there, ids[tokens] % experts_per_rank, -1).int()
    parts = x[tokens], local, torch.where(is_there, weights[tokens], 0.0)
    return tuple(all_to_all(group, part, received, sent) for part in parts), Journey(group, tokens, sent, received)


def combine(y: torch.Tensor, journey: Journey, num_tokens: int) -> torch.Tensor:
    """Sum of what the ranks made of each token: y [R, D] -> [num_tokens, D]."""
    rows = all_to_all(journey.group, y, journey.sent, journey.received)
    out = rows.new_zeros(num_tokens, rows.shape[1], dtype=torch.float32)
    return out.index_add(0, journey.tokens, rows.float()).to(y.dtype)
