"""Spreads generation over all ranks: every rank samples its share of the prompts, and every rank gets all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(items: Sequence[Item], rank: int, size: int, work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """Results of `work` over all items, in the items' order, the same on every rank.

    Args:
        items: the same on every rank.
        rank:  of this process.
        size:  number of processes.
        work:  called once with this rank's items (every size-th); returns one result an item.

    Returns:
        One result an item.
    """
    own = work(list(items[rank::size]))
    if size == 1:
        return own
    gathered: list = [None] * size
    dist.all_gather_object(gathered, own)
    return [gathered[i % size][i // size] for i in range(len(items))]
