"""Where tokens that are run together stand: in their sequences, and in the rows that hold keys and values."""

from __future__ import annotations

from itertools import accumulate, chain
from typing import NamedTuple

import torch


class NewTokens(NamedTuple):
    """N new tokens, [N] int64 each. A row has a prefix, and behind it a sequence that goes on from there, or several.

    So a token sees the first `pasts` places of its row, and behind them those from the first one of its own sequence up
    to itself: all that is before it in the sequence.
    """

    ids: torch.Tensor
    positions: torch.Tensor  # in the sequence
    rows: torch.Tensor
    places: torch.Tensor  # in the row, where keys and values go
    pasts: torch.Tensor  # tokens of the prefix

    @classmethod
    def behind(cls, tokens: list[list[list[int]]], before: list[int], device: torch.device) -> NewTokens:
        """Of the sequences that go on from prefixes of so many tokens, a row each; as `Decoder.extend` has them."""
        sequences = sequences_of(tokens, before)
        rows, starts, counts = torch.tensor(sequences).unbind(1)
        rows, starts = (x.repeat_interleave(counts) for x in (rows, starts))
        ids = torch.tensor([*chain.from_iterable(chain.from_iterable(tokens))])
        index = torch.arange(len(ids)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        pasts = torch.tensor(before)[rows]
        return cls(*torch.stack([ids, pasts + index, rows, starts + index, pasts]).to(device))

    def mask(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For attention row by row: [N] int64, each token's place among the new ones of its row, and what it sees,
        [rows, 1, new tokens, places] bool."""
        queries = self.places - self.pasts
        keys = torch.arange(int(self.places.max()) + 1, device=self.places.device)
        own = (self.places - self.positions + self.pasts).unsqueeze(1)
        sees = (keys < self.pasts[:, None]) | ((keys >= own) & (keys <= self.places[:, None]))
        mask = sees.new_zeros(int(self.rows.max()) + 1, int(queries.max()) + 1, len(keys))
        mask |= keys == 0  # of a place without a token something is seen: nothing would be nan
        mask[self.rows, queries] = sees
        return queries, mask.unsqueeze(1)


def sequences_of(tokens: list[list[list[int]]], before: list[int]) -> list[tuple[int, int, int]]:
    """Row, first place and number of tokens of each sequence, in order."""
    found = []
    for row, of_row in enumerate(tokens):
        starts = accumulate((len(ids) for ids in of_row[:-1]), initial=before[row])
        found += [(row, start, len(ids)) for start, ids in zip(starts, of_row, strict=True)]
    return found
