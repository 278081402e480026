"""Keys and values of the sequences being decoded: on a CPU a row each, which grows; on a GPU in pages (pages.py)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.kv_shape import kv_shape, value_numbers
from r1engine.hf.rotary import rotary_frequencies

BLOCK_TOKENS = 64  # capacity is a multiple of this
FIRST_TOKENS = 256  # capacity to start with, if sequences may get so long: short runs never copy
GROWTH = 1.5  # of the length needed: copying stays a small part of decoding, unused memory under a third

# Layer, queries [N, query heads, numbers] and what is kept [N, parts * heads, numbers] of one new token in each of the
# first N rows -> what they attend to, [N, query heads * numbers of a value].
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class Cache(Protocol):
    """Row r holds one sequence, position 0 first. The rows that are decoded are the first ones.

    Of a token and layer it keeps [parts, heads, numbers], `kv_shape`: keys, then values; of latent
    attention one part and head, whose first numbers are the value.

    Attributes:
        layers:    per layer [parts, ..., heads, ..., numbers].
        rotations: [at least the longest sequence, rope_dim / 2] complex64, exp(i * angle) of each position and pair.
    """

    layers: list[torch.Tensor]
    rotations: torch.Tensor

    def may_start(self, lengths: Sequence[int], names: Sequence[Hashable], live: int) -> int:
        """How many of these sequences may start, in order, beside `live` others; those of one name are the same."""

    def fill(
        self,
        rows: np.ndarray,
        kv: list[torch.Tensor],
        source: np.ndarray,
        lengths: np.ndarray,
        names: Sequence[Hashable],
    ) -> None:
        """Starts sequences from prompts: row rows[i] becomes prompt source[i], of lengths[i] tokens.

        Args:
            rows, source, lengths: [N] int64.
            kv:    per layer [parts, prompts, heads, T, numbers].
            names: [N] of the prompts; equal prompts have one in all calls.
        """

    def restore(self, rows: Sequence[int], kv: Sequence[torch.Tensor]) -> None:
        """Starts sequences from what is kept of one, per layer [parts, heads, T, numbers], of any device."""

    def copy(self, row: int, start: int, stop: int) -> torch.Tensor:
        """What is kept of tokens [start, stop) of a row, [layers, parts, heads, stop - start, numbers]."""

    def move(self, source: np.ndarray, target: np.ndarray, length: int) -> None:
        """Puts rows `source` in the place of `target`, [N] int64 and disjoint; `length` is their longest."""

    def release(self, rows: Sequence[int]) -> None:
        """The sequences of these rows have ended."""

    def reserve(self, positions: np.ndarray) -> bool:
        """Makes room for the tokens at positions[r] of rows r; False, and none, if there is too little."""

    def attention(self, positions: torch.Tensor) -> Attend:
        """Of the next step, for which there is room: positions [N] int64, where each row's token goes."""


class KVCache:
    """A `Cache` on a CPU: memory of one length for all rows, which compiled functions read from end to end.

    Attributes:
        layers: per layer [parts, rows, heads, capacity, numbers]. Starts as zeros: a masked column has weight 0, and
                0 * nan of uninitialized memory would be nan.
        mask:   [rows, heads, capacity], 0 where the row has a token, -inf elsewhere.
    """

    def __init__(self, arch: Architecture, *, rows: int, limit: int, dtype: torch.dtype) -> None:
        """An empty cache for `rows` sequences of at most `limit` tokens."""
        self._arch = arch
        self._limit = limit
        self._rows = torch.arange(rows)
        self._length = 0  # of the longest row with its next token
        self.capacity = 0
        parts, heads, numbers = kv_shape(arch)
        self.layers = [torch.zeros(parts, rows, heads, 0, numbers, dtype=dtype)] * arch.num_layers
        self.mask = torch.zeros(rows, heads, 0, dtype=dtype)
        self._attended = torch.zeros((), dtype=dtype)  # what a mask says of a token
        self.rotations = torch.empty(0, arch.rope_dim // 2, dtype=torch.complex64)

    def fits(self, rows: int, limit: int) -> bool:
        """Whether it has place for so many sequences of so many tokens; what it held of others does not matter."""
        return rows <= len(self._rows) and limit <= self._limit

    def may_start(self, lengths: Sequence[int], names: Sequence[Hashable], live: int) -> int:
        """See `Cache`: all, as the host's memory is not counted."""
        return len(lengths)

    def fill(
        self,
        rows: np.ndarray,
        kv: list[torch.Tensor],
        source: np.ndarray,
        lengths: np.ndarray,
        names: Sequence[Hashable],
    ) -> None:
        """See `Cache`."""
        width, (at, prompts) = kv[0].shape[3], (torch.from_numpy(rows), torch.from_numpy(source))
        self._grow(width)
        for layer, prompt_kv in zip(self.layers, kv, strict=True):
            layer[:, at, :, :width] = prompt_kv[:, prompts]
        is_free = torch.arange(self.capacity) >= torch.from_numpy(lengths).unsqueeze(1)
        self.mask[at] = torch.where(is_free, -torch.inf, 0.0).to(self.mask.dtype).unsqueeze(1)

    def restore(self, rows: Sequence[int], kv: Sequence[torch.Tensor]) -> None:
        """See `Cache`."""
        at, length = torch.tensor(rows), kv[0].shape[2]
        self._grow(length)
        for layer, part in zip(self.layers, kv, strict=True):
            layer[:, at, :, :length] = part.unsqueeze(1)
        is_free = torch.arange(self.capacity) >= length
        self.mask[at] = torch.where(is_free, -torch.inf, 0.0).to(self.mask.dtype)

    def copy(self, row: int, start: int, stop: int) -> torch.Tensor:
        """See `Cache`."""
        return torch.stack([layer[:, row, :, start:stop] for layer in self.layers])

    def move(self, source: np.ndarray, target: np.ndarray, length: int) -> None:
        """See `Cache`."""
        old, new = torch.from_numpy(source), torch.from_numpy(target)
        for layer in self.layers:
            layer[:, new, :, :length] = layer[:, old, :, :length]
        self.mask[new] = self.mask[old]

    def release(self, rows: Sequence[int]) -> None:
        """See `Cache`: the next sequence overwrites them."""

    def reserve(self, positions: np.ndarray) -> bool:
        """See `Cache`: always True."""
        self._length = int(positions.max()) + 1
        self._grow(self._length)
        return True

    def attention(self, positions: torch.Tensor) -> Attend:
        """See `Cache`."""
        (num_parts, kv_heads, dim), value_dim = kv_shape(self._arch), value_numbers(self._arch)
        num_rows, length, scale = len(positions), self._length, self._arch.softmax_scale
        heads = num_rows * kv_heads
        self.mask[self._rows[:num_rows], :, positions] = self._attended
        mask = self.mask.view(-1, 1, self.capacity)[:heads, :, :length]
        parts = torch.arange(num_parts)[:, None] * (len(self._rows) * kv_heads)
        places = (parts + torch.arange(kv_heads)).view(1, -1) + self._rows[:num_rows, None] * kv_heads
        slots = (places * self.capacity + positions[:, None]).view(-1)

        def attend(index: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
            layer = self.layers[index]
            layer.view(-1, dim).index_copy_(0, slots, key_value.reshape(-1, dim))
            kept = layer.view(num_parts, -1, self.capacity, dim)[:, :heads, :length]
            keys, values = kept[0], kept[-1, :, :, :value_dim]
            # [N * kv_heads, heads / kv_heads, dim]: the query heads of one key head are its batch.
            # Not baddbmm, which takes longer than both.
            scores = torch.bmm(query.reshape(heads, -1, dim), keys.transpose(1, 2))
            torch.add(mask, scores, alpha=scale, out=scores)
            probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
            return torch.bmm(probs, values).view(num_rows, -1)

        return attend

    def _grow(self, length: int) -> None:
        """Makes room for sequences of `length` tokens, keeping what is there."""
        if length <= self.capacity:
            return
        wanted = min(max(int(length * GROWTH), FIRST_TOKENS), self._limit)
        old, self.capacity = self.capacity, -(-wanted // BLOCK_TOKENS) * BLOCK_TOKENS
        for index, layer in enumerate(self.layers):  # old and new are both alive for one layer at a time
            grown = layer.new_zeros(*layer.shape[:3], self.capacity, layer.shape[4])
            grown[:, :, :, :old] = layer
            self.layers[index] = grown
        mask = self.mask.new_full((*self.mask.shape[:2], self.capacity), -torch.inf)
        mask[:, :, :old] = self.mask
        self.mask = mask
        self.rotations = rotary_table(self._arch, self.capacity, mask.device)


def bytes_of(cache: Cache, num_tokens: int) -> int:
    """Memory of the keys and values of so many tokens of one sequence."""
    layer = cache.layers[0]
    return len(cache.layers) * layer.shape[0] * layer.shape[2] * num_tokens * layer.shape[4] * layer.element_size()


def rotary_table(arch: Architecture, length: int, device: torch.device) -> torch.Tensor:
    """[length, rope_dim / 2] complex64, exp(i * angle) of each position and rotary pair, times the magnitude."""
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, rotary_frequencies(arch).to(device))
    return torch.polar(torch.full_like(angles, arch.rope_magnitude), angles)


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> None:
    """Turns each pair of neighbours of the last dimension by its angle, in place, in float32."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2))).mul_(rotations)
    if heads.dtype != torch.float32:  # float() made a copy
        heads.copy_(torch.view_as_real(pairs).flatten(-2))
