"""Keys and values of the sequences being decoded, grown as the sequences grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.rotary import rotary_frequencies

BLOCK_TOKENS = 64  # capacity is a multiple of this
FIRST_TOKENS = 256  # capacity to start with, if sequences may get so long: short runs never copy
GROWTH = 1.5  # of the length needed: copying stays a small part of decoding, unused memory under a third


class KVCache:
    """Row r holds one sequence, position 0 first.

    On a GPU it has all its memory from the first token on: it never grows, so that a step that was recorded finds it.

    Attributes:
        layers:    per layer [2, rows, kv_heads, capacity, head_dim]: keys, then values. Starts as zeros: a masked
                   column has weight 0, and 0 * nan of uninitialized memory would be nan.
        mask:      [rows, kv_heads, capacity], 0 where the row has a token, -inf elsewhere.
        rotations: [capacity, rope_dim / 2] complex64, exp(i * angle) of each position and pair.
    """

    def __init__(self, arch: Architecture, *, rows: int, limit: int, device: torch.device, dtype: torch.dtype) -> None:
        """An empty cache for `rows` sequences of at most `limit` tokens."""
        self._arch = arch
        self._limit = limit
        self._rows = torch.arange(rows, device=device)
        self.capacity = 0
        empty = torch.zeros(2, rows, arch.num_kv_heads, 0, arch.head_dim, device=device, dtype=dtype)
        self.layers = [empty] * arch.num_layers
        self.mask = torch.zeros(rows, arch.num_kv_heads, 0, device=device, dtype=dtype)
        self._attended = torch.zeros((), device=device, dtype=dtype)  # what a mask says of a token
        self.rotations = torch.empty(0, arch.rope_dim // 2, device=device, dtype=torch.complex64)

    def fits(self, rows: int, limit: int) -> bool:
        """Whether it has place for so many sequences of so many tokens; what it held of others does not matter."""
        return rows <= len(self._rows) and limit <= self._limit

    def reserve(self, length: int) -> None:
        """Makes room for sequences of `length` tokens, keeping what is there."""
        if length <= self.capacity:
            return
        wanted = max(int(length * GROWTH), FIRST_TOKENS) if self.mask.device.type == "cpu" else self._limit
        old, self.capacity = self.capacity, in_blocks(min(wanted, self._limit))
        for index, layer in enumerate(self.layers):  # old and new are both alive for one layer at a time
            grown = layer.new_zeros(*layer.shape[:3], self.capacity, layer.shape[4])
            grown[:, :, :, :old] = layer
            self.layers[index] = grown
        mask = self.mask.new_full((*self.mask.shape[:2], self.capacity), -torch.inf)
        mask[:, :, :old] = self.mask
        self.mask = mask
        self.rotations = rotary_table(self._arch, self.capacity, mask.device)

    def fill(self, rows: torch.Tensor, kv: list[torch.Tensor], source: torch.Tensor, lengths: torch.Tensor) -> None:
        """Starts sequences from prompts: row rows[i] becomes prompt source[i], of lengths[i] tokens.

        Args:
            rows, source, lengths: [N] int64.
            kv: per layer [2, prompts, kv_heads, T, head_dim], T at most the capacity.
        """
        width = kv[0].shape[3]
        for layer, prompt_kv in zip(self.layers, kv, strict=True):
            layer[:, rows, :, :width] = prompt_kv[:, source]
        is_free = torch.arange(self.capacity, device=self.mask.device) >= lengths.unsqueeze(1)
        self.mask[rows] = torch.where(is_free, -torch.inf, 0.0).to(self.mask.dtype).unsqueeze(1)

    def restore(self, rows: Sequence[int], kv: torch.Tensor) -> None:
        """Starts sequences from keys and values [layers, 2, kv_heads, T, head_dim], T at most the capacity."""
        at, length = torch.tensor(rows, device=self.mask.device), kv.shape[3]
        for layer, part in zip(self.layers, kv, strict=True):
            layer[:, at, :, :length] = part.unsqueeze(1)
        is_free = torch.arange(self.capacity, device=self.mask.device) >= length
        self.mask[at] = torch.where(is_free, -torch.inf, 0.0).to(self.mask.dtype)

    def copy(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Keys and values of tokens [start, stop) of a row, [layers, 2, kv_heads, stop - start, head_dim]."""
        return torch.stack([layer[:, row, :, start:stop] for layer in self.layers])

    def bytes_of(self, num_tokens: int) -> int:
        """Memory of the keys and values of so many tokens of one sequence."""
        layer = self.layers[0]
        return len(self.layers) * 2 * layer.shape[2] * num_tokens * layer.shape[4] * layer.element_size()

    def move(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copies rows `source` over rows `target`, [N] int64 and disjoint; `length` is their longest."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]
        self.mask[target] = self.mask[source]

    def extend(self, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes place for one more token in each of the first N rows.

        Args:
            positions: [N] int64, where each row's token goes.
            length:    columns to return.

        Returns:
            the rows' mask with their new tokens, [N * kv_heads, 1, length], a view; and the indices of the tokens in
            a layer of [2 * rows * kv_heads * capacity, head_dim], [N * 2 * kv_heads], keys first in each row.
        """
        num_rows, kv_heads = positions.shape[0], self.mask.shape[1]
        self.mask[self._rows[:num_rows], :, positions] = self._attended
        mask = self.mask.view(-1, 1, self.capacity)[: num_rows * kv_heads, :, :length]
        halves = torch.arange(2, device=positions.device)[:, None] * (len(self._rows) * kv_heads)
        heads = (halves + torch.arange(kv_heads, device=positions.device)).view(1, -1)
        slots = (heads + self._rows[:num_rows, None] * kv_heads) * self.capacity + positions[:, None]
        return mask, slots.view(-1)

    def append(
        self, index: int, slots: torch.Tensor, key_value: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one token of each of the first N rows in layer `index`; returns what they attend to.

        Args:
            slots:     from `extend`.
            key_value: [N, 2 * kv_heads, head_dim], keys first.
            length:    columns to return.

        Returns:
            keys and values, [N * kv_heads, length, head_dim] each, views.
        """
        layer, (num_rows, _, head_dim) = self.layers[index], key_value.shape
        layer.view(-1, head_dim).index_copy_(0, slots, key_value.reshape(-1, head_dim))
        heads = num_rows * layer.shape[2]
        keys, values = layer.view(2, -1, self.capacity, head_dim)[:, :heads, :length].unbind(0)
        return keys, values


def in_blocks(length: int) -> int:
    """Columns for so many tokens."""
    return -(-length // BLOCK_TOKENS) * BLOCK_TOKENS


def rotary_table(arch: Architecture, length: int, device: torch.device) -> torch.Tensor:
    """[length, rope_dim / 2] complex64, exp(i * angle) of each position and rotary pair, times the magnitude."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(arch).to(device))
    return torch.polar(torch.full_like(angles, arch.rope_magnitude), angles)
