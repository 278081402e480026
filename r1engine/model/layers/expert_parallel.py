"""Tokens to the ranks that hold their experts, and back. A token goes to a rank once, however many of its experts
live there; tokens that are FP8 already cross the wire in FP8.

A journey is one layer's way in one forward pass, and the same way in its backward: `depart` (tokens and choices out),
`follow` (gradients out), `arrive` (results or gradients back, summed). `AllToAll` runs on gloo and NCCL; DeepEp
(deep_ep.py) has the same three calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from r1kernels import Fp8

Tokens = torch.Tensor | Fp8  # [T, D]


class Arrived(NamedTuple):
    """The R tokens that came to the experts of this rank."""

    x: Tokens  # [R, D]
    ids: torch.Tensor  # [R, K] int32, local expert; -1 where the choice is another rank's
    weights: torch.Tensor  # [R, K] float32
    num_choices: int | None  # ids that are not -1, as the host knows; None: all


class AllToAll:
    """A journey by all_to_all of whole rows."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.experts_per_rank = num_experts // group.size()

    def depart(self, x: Tokens, ids: torch.Tensor, weights: torch.Tensor) -> Arrived:
        """Send every token to the ranks of its experts.

        Args:
            x:       [T, D].
            ids:     [T, K] int32, experts of the whole model.
            weights: [T, K] float32.

        Returns:
            What came here, ordered by source rank and token.
        """
        self.num_tokens = len(ids)
        rank_of = ids // self.experts_per_rank  # [T, K]
        ranks = torch.arange(self.group.size(), device=ids.device)
        choices = (rank_of[None] == ranks[:, None, None]).sum(-1)  # [ranks, T]
        goes = choices > 0
        out = torch.stack([goes.sum(1), choices.sum(1)], dim=1)  # tokens and choices that each rank gets
        back = torch.empty_like(out)
        dist.all_to_all_single(back, out, group=self.group)
        # all_to_all takes its sizes from the host: the one wait of the layer, so `nonzero` is told its own.
        (self.sent, _), (self.received, arriving) = torch.stack([out, back]).mT.tolist()
        # Rows sent: token of each, rank after rank.
        destination, self.tokens = goes.nonzero_static(size=sum(self.sent)).unbind(1)
        self.is_there = rank_of[self.tokens] == destination[:, None]
        local = torch.where(self.is_there, ids[self.tokens] % self.experts_per_rank, -1)
        there = torch.where(self.is_there, weights[self.tokens], 0.0)
        return Arrived(self.follow(x), self._exchange(local.int()), self._exchange(there), sum(arriving))

    def follow(self, x: Tokens) -> Tokens:
        """x [T, D] to where its tokens went, [R, D]."""
        if isinstance(x, Fp8):
            values, scale = x
            bytes_there = self._exchange(values.view(torch.uint8)[self.tokens])
            return Fp8(bytes_there.view(values.dtype), self._exchange(scale[self.tokens]))
        return self._exchange(x[self.tokens])

    def arrive(self, rows: torch.Tensor, of_weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sums over the ranks, in rank order in float32: rows [R, D] -> [T, D], of_weights [R, K] -> [T, K]."""
        return self._sum(rows), None if of_weights is None else self._sum(of_weights)

    def _exchange(self, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_empty(sum(self.received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), self.received, self.sent, group=self.group)
        return out

    def _sum(self, rows: torch.Tensor) -> torch.Tensor:
        back = rows.new_empty(sum(self.sent), rows.shape[1])
        dist.all_to_all_single(back, rows.contiguous(), self.sent, self.received, group=self.group)
        out = torch.zeros(self.num_tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
        # A token comes from a rank at most once, so each call adds once to a place: the order is that of the ranks.
        for part, tokens in zip(back.split(self.sent), self.tokens.split(self.sent), strict=True):
            out.index_add_(0, tokens, part.float())
        return out.to(rows.dtype)
