"""Keys and values in pages of a pool, which go to sequences as they grow and come back when they end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from r1engine.hf.architecture import Architecture
from r1engine.hf.kv_shape import kv_shape, value_numbers
from r1engine.rollout.local.cache import Attend, rotary_table
from r1kernels import paged_attention

PAGE_TOKENS = 64  # of a page: half a page of each sequence is unused on average
NOBODYS = 0  # the page that rows without a sequence write to


class PagedCache:
    """A `Cache` whose memory is fixed, whatever the lengths of its sequences are.

    Equal prompts that start one behind the other share their full pages. Nothing moves or grows: a step that was
    recorded finds the pool, the table and the lengths in their places.

    Attributes:
        layers: per layer [parts, pages + 1, heads, PAGE_TOKENS, numbers], as `kv_shape` has them.
        table:  [rows, pages of the longest sequence] int32, on the device: the pages of each row.
    """

    def __init__(
        self, arch: Architecture, *, rows: int, limit: int, pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """An empty cache for `rows` sequences of at most `limit` tokens; `pages` are at least those of one of them."""
        assert pages >= num_pages(limit)
        self._scale, self._value_dim = arch.softmax_scale, value_numbers(arch)
        parts, self._num_heads, numbers = kv_shape(arch)
        shape = (parts, pages + 1, self._num_heads, PAGE_TOKENS, numbers)
        self.layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(arch.num_layers)]
        self.table = torch.zeros(rows, num_pages(limit), device=device, dtype=torch.int32)
        self.rotations = rotary_table(arch, limit, device)
        # Where the parts of each head begin in a layer of [parts * (pages + 1) * heads * tokens, numbers].
        heads_at = torch.arange(self._num_heads, device=device) * PAGE_TOKENS
        parts_at = torch.arange(parts, device=device) * ((pages + 1) * self._num_heads * PAGE_TOKENS)
        self._heads_at = (parts_at[:, None] + heads_at).view(1, -1)
        # What follows is on the host.
        self._free = list(range(pages, NOBODYS, -1))
        self._users = np.zeros(pages + 1, dtype=np.int64)  # rows that have a page, and the last prompt
        self._host_table = np.zeros((rows, num_pages(limit)), dtype=np.int32)  # as `table` is to be
        self._counts = np.zeros(rows, dtype=np.int64)  # pages of each row
        self._changed: set[int] = set()  # rows of `table`
        self._last: tuple[Hashable, np.ndarray] | None = None  # the prompt that started last, and its full pages

    def may_start(self, lengths: Sequence[int], names: Sequence[Hashable], live: int) -> int:
        """See `Cache`: all, if there are pages for the longest in each row; else as many as leave a page for each one
        that runs then, and one where nothing runs."""
        if len(self._users) > self._host_table.size:
            return len(lengths)
        if self._last is not None and self._last[0] != names[0]:
            self._forget_last()  # samples of a prompt follow each other
        last, free = self._last[0] if self._last is not None else object(), len(self._free)
        for count, (length, name) in enumerate(zip(lengths, names, strict=True)):
            free -= num_pages(length) - (length // PAGE_TOKENS if name == last else 0)
            last = name
            if free < live + count + 1:
                return max(count, int(live == 0))
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
        written: list[tuple[int, int, int]] = []  # prompt, page of it, page of the pool
        for row, prompt, length, name in zip(rows.tolist(), source.tolist(), lengths.tolist(), names, strict=True):
            written += [(prompt, place, page) for place, page in self._start(row, length, name)]
        if not written:
            return
        prompts, places, pages = torch.tensor(written).to(self.table.device).unbind(1)
        for layer, prompt_kv in zip(self.layers, kv, strict=True):
            whole = pad(prompt_kv.to(layer.device), (0, 0, 0, -prompt_kv.shape[3] % PAGE_TOKENS))
            of_prompts = whole.unflatten(3, (-1, PAGE_TOKENS))  # [parts, prompts, heads, pages, tokens, numbers]
            layer[:, pages] = of_prompts[:, prompts, :, places].transpose(0, 1)

    def restore(self, rows: Sequence[int], kv: Sequence[torch.Tensor]) -> None:
        """See `Cache`."""
        length, zeros = kv[0].shape[2], np.zeros(len(rows), dtype=np.int64)
        name = object()
        self.fill(np.array(rows), [part.unsqueeze(1) for part in kv], zeros, zeros + length, [name] * len(rows))
        self._forget_last()

    def copy(self, row: int, start: int, stop: int) -> torch.Tensor:
        """See `Cache`."""
        first, skipped = divmod(start, PAGE_TOKENS)
        pages = self._pages(row, first, num_pages(stop))
        parts, _, heads, _, numbers = self.layers[0].shape
        found = self.layers[0].new_empty(len(self.layers), parts, heads, stop - start, numbers)
        for part, layer in zip(found, self.layers, strict=True):  # for all at once there may be no room
            part.copy_(_in_line(layer[:, pages])[:, :, skipped : skipped + stop - start])
        return found

    def set_aside(self, row: int, length: int) -> list[torch.Tensor]:
        """Takes the first `length` tokens of a row to the host, for `restore`; its pages are free then."""
        pages = self._pages(row, 0, num_pages(length))
        kept = []
        for layer in self.layers:  # for all at once there is no room on the device
            kept.append(_in_line(layer[:, pages])[:, :, :length].cpu())
        self.release([row])
        return kept

    def move(self, source: np.ndarray, target: np.ndarray, length: int) -> None:
        """See `Cache`; `target` have no pages."""
        self._host_table[target], self._counts[target] = self._host_table[source], self._counts[source]
        self._counts[source] = 0
        self._changed.update(target.tolist())

    def release(self, rows: Sequence[int]) -> None:
        """See `Cache`."""
        for row in rows:
            self._let_go(self._host_table[row, : self._counts[row]])
            self._counts[row] = 0

    def reserve(self, positions: np.ndarray) -> bool:
        """See `Cache`."""
        lacking = np.flatnonzero(positions // PAGE_TOKENS == self._counts[: len(positions)]).tolist()
        if len(lacking) > len(self._free):
            self._forget_last()
        if len(lacking) > len(self._free):
            return False
        for row in lacking:
            self._add(row, self._take(1))
        if self._changed:  # one transfer: the numbers of the rows, and the rows
            changed = sorted(self._changed)
            upload = torch.from_numpy(np.column_stack([changed, self._host_table[changed]])).to(self.table.device)
            self.table.index_copy_(0, upload[:, 0], upload[:, 1:].int())
            self._changed.clear()
        return True

    def attention(self, positions: torch.Tensor) -> Attend:
        """See `Cache`; -1 stands for a row without a sequence, whose result is 0."""
        table, lengths = self.table[: len(positions)], (positions + 1).int()
        inside = positions.clamp(min=0)
        pages = table.gather(1, inside.unsqueeze(1) // PAGE_TOKENS).squeeze(1)
        pages = torch.where(positions < 0, NOBODYS, pages).long()
        slots = (pages * (self._num_heads * PAGE_TOKENS) + inside % PAGE_TOKENS).unsqueeze(1) + self._heads_at
        slots = slots.view(-1)

        def attend(index: int, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
            layer = self.layers[index]
            layer.view(-1, layer.shape[4]).index_copy_(0, slots, key_value.reshape(-1, layer.shape[4]))
            values, dim = (layer[1], None) if len(layer) == 2 else (None, self._value_dim)
            mixed = paged_attention(query, layer[0], values, table, lengths, value_dim=dim, scale=self._scale)
            return mixed.flatten(1)

        return attend

    def _start(self, row: int, length: int, name: Hashable) -> list[tuple[int, int]]:
        """Gives a row pages for a prompt; returns those to be written, as (page of the prompt, page of the pool)."""
        whole, written = length // PAGE_TOKENS, []
        if self._last is None or self._last[0] != name:
            self._forget_last()
            self._last = name, self._take(whole)
            written = list(enumerate(self._last[1].tolist()))
        self._add(row, self._last[1])
        self._users[self._last[1]] += 1
        if length % PAGE_TOKENS:
            self._add(row, self._take(1))
            written.append((whole, int(self._host_table[row, whole])))
        return written

    def _take(self, count: int) -> np.ndarray:
        """Pages that were free, with one user."""
        taken = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
        self._users[taken] = 1
        return taken

    def _add(self, row: int, pages: np.ndarray) -> None:
        count = self._counts[row]
        self._host_table[row, count : count + len(pages)] = pages
        self._counts[row] += len(pages)
        self._changed.add(row)

    def _let_go(self, pages: np.ndarray) -> None:
        self._users[pages] -= 1
        self._free += pages[self._users[pages] == 0].tolist()

    def _forget_last(self) -> None:
        if self._last is not None:
            self._let_go(self._last[1])
            self._last = None

    def _pages(self, row: int, first: int, stop: int) -> torch.Tensor:
        """[stop - first] int64, on the device: pages of a row."""
        return torch.from_numpy(self._host_table[row, first:stop].astype(np.int64)).to(self.table.device)


def num_pages(length: int) -> int:
    """Pages of so many tokens."""
    return -(-length // PAGE_TOKENS)


def _in_line(pages: torch.Tensor) -> torch.Tensor:
    """[parts, pages, heads, tokens of a page, numbers] -> [parts, heads, tokens, numbers]."""
    return pages.transpose(1, 2).flatten(2, 3)
