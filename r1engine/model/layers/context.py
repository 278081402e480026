"""Context parallelism: the tokens of a packed row dealt to ranks, and brought together where a layer needs them all.

The row is cut into 2 x ranks chunks, of which rank r holds r and 2 x ranks - 1 - r: in one long sequence every rank has
the same causal attention to compute. All ranks are told the whole row, and all compute its whole loss.

Attention gathers the keys and values of the row (as Llama 3 was trained, arXiv 2407.21783, section 3.3.2). A ring that
passes them around holds less at once, but wants every sequence padded to a multiple of the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Chunk:
    """Neighbouring tokens of the row, and the keys that they attend to: of each sequence in the chunk, all before."""

    tokens: slice  # of those that this rank holds
    keys: slice  # of the row
    num_queries: list[int]  # of each sequence that has tokens in the chunk
    num_keys: list[int]
    cu_queries: torch.Tensor  # [sequences in the chunk + 1] int32, the same summed up
    cu_keys: torch.Tensor


@dataclass(frozen=True)
class Share:
    """What this rank holds of a row of T tokens."""

    index: torch.Tensor  # [T / ranks] int64, rising: the tokens
    cu_seqlens: torch.Tensor  # [S+1] int32: first of this rank's tokens in each sequence, then T / ranks
    chunks: tuple[Chunk, Chunk]
    group: dist.ProcessGroup | None  # of the ranks that hold the others

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] in the order of the row, from [T / ranks, ...]; the gradients of all ranks are summed."""
        return _Gather.apply(x, self.group)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, without gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T] from [..., T / ranks], for what all ranks compute alike: a rank keeps its part of the gradient."""
        return _Whole.apply(x, self.index, self.group)


def share_of_row(cu_seqlens: torch.Tensor, rank: int, ranks: int, group: dist.ProcessGroup | None) -> Share:
    """The share of one rank. Reads cu_seqlens [S+1] int32 from the device, once a row.

    Raises:
        ValueError: the row's tokens are not a multiple of 2 x ranks.
    """
    borders = cu_seqlens.tolist()
    if borders[-1] % (2 * ranks):
        raise ValueError(
            f"parallel.context: a row of {borders[-1]} tokens cannot be dealt to {ranks} ranks, required a multiple of "
            f"{2 * ranks} (Policy.row_multiple, for `pack`)"
        )
    size, device = borders[-1] // (2 * ranks), cu_seqlens.device
    starts = rank * size, (2 * ranks - 1 - rank) * size
    index = torch.cat([torch.arange(start, start + size, device=device) for start in starts])
    held = sum((cu_seqlens - start).clamp(0, size) for start in starts)
    early, late = (_chunk(borders, start, size, place * size, device) for place, start in enumerate(starts))
    return Share(index, held, (early, late), group)


def _chunk(borders: list[int], start: int, size: int, place: int, device: torch.device) -> Chunk:
    """Tokens [start, start + size) of the row, which are [place, place + size) of the rank."""
    end = start + size
    inside = [(a, min(b, end)) for a, b in pairwise(borders) if b > start and a < end]
    num_queries, num_keys = [b - max(a, start) for a, b in inside], [b - a for a, b in inside]
    cu_queries, cu_keys = (
        torch.tensor([0, *numbers]).cumsum(0).to(device, torch.int32) for numbers in (num_queries, num_keys)
    )
    return Chunk(slice(place, place + size), slice(inside[0][0], end), num_queries, num_keys, cu_queries, cu_keys)


def _held(ranks: int) -> list[int]:
    """Chunks of the row, rank after rank."""
    return [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]


def _in_row_order(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, ...] from each rank's [T / ranks, ...]."""
    ranks = group.size()
    gathered = x.new_empty(ranks * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    chunks, held = gathered.chunk(2 * ranks), _held(ranks)
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * ranks)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _in_row_order(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = ctx.group.size()
        chunks = grad.chunk(2 * ranks)
        by_rank = torch.cat([chunks[chunk] for chunk in _held(ranks)])
        own = by_rank.new_empty(len(by_rank) // ranks, *by_rank.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank, group=ctx.group)
        return own, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.save_for_backward(index)
        return _in_row_order(x.movedim(-1, 0), group).movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(-1, index), None, None
