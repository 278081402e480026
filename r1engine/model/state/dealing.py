"""Deals parameters to ranks, so that each is sent by one rank and all send about as much."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Unit:
    """Parameters that one rank gets together."""

    names: list[str]
    holders: list[int]  # ranks that have them or a part of them
    size: int = 0  # elements of their Hugging Face tensors


def deal(units: list[Unit]) -> list[int]:
    """The rank that gets each unit: the one of its holders with the least so far.

    Units that few ranks hold go first, then the large ones; so every rank of the same units finds the same.
    """
    loads: dict[int, int] = {rank: 0 for unit in units for rank in unit.holders}
    owners: list[int] = [0] * len(units)
    for index in sorted(range(len(units)), key=lambda i: (len(units[i].holders), -units[i].size, i)):
        unit = units[index]
        owner = min(unit.holders, key=lambda rank: (loads[rank], rank))
        loads[owner] += unit.size
        owners[index] = owner
    return owners
