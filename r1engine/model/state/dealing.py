"""Deals parameters to ranks, so that each is sent by one rank and all send about as much."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lot:
    """Parameters that one rank gets together."""

    names: list[str]
    holders: list[int]  # ranks that have them or a part of them
    size: int = 0  # elements of their Hugging Face tensors


def deal(lots: list[Lot]) -> list[int]:
    """The rank that gets each lot: the one of its holders with the least so far.

    Lots that few ranks hold go first, then the large ones; so every rank of the same lots finds the same.
    """
    loads: dict[int, int] = {rank: 0 for lot in lots for rank in lot.holders}
    owners: list[int] = [0] * len(lots)
    for index in sorted(range(len(lots)), key=lambda i: (len(lots[i].holders), -lots[i].size, i)):
        lot = lots[index]
        owner = min(lot.holders, key=lambda rank: (loads[rank], rank))
        loads[owner] += lot.size
        owners[index] = owner
    return owners


def in_turns(dealt: list[tuple[Lot, int]]) -> list[tuple[Lot, int]]:
    """Lots with their owners, ordered so that every owner has had about as much after any number of them.

    Each owner's lots keep their order: a lot comes by the size of what its owner has had before.
    """
    had: dict[int, int] = {}
    before: list[int] = []
    for lot, owner in dealt:
        before.append(had.get(owner, 0))
        had[owner] = before[-1] + lot.size
    return [dealt[i] for i in sorted(range(len(dealt)), key=before.__getitem__)]
