"""Keys and values of steps that may be drawn from again: a tree of segments, within a bound of memory.

A row of the decoder holds the keys and values of all its tokens but the last one, which is not run yet. What a step
leaves is that part of its row that the steps before it do not have: from their last token up to its own last but one.
So a draw from a step runs its own new tokens and nothing twice.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1engine.rollout.draft import Draft
from r1engine.rollout.local.cache import KVCache

StepKey = tuple[int, int]  # question, step


@dataclass(frozen=True)
class _Segment:
    parent: StepKey | None
    start: int  # index of its first token in the sequence
    kv: torch.Tensor  # [layers, 2, kv_heads, tokens, head_dim]

    @property
    def stop(self) -> int:
        return self.start + self.kv.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


class KVStore:
    """Segments by (question, step). A segment is there only with all that come before it.

    Where memory ends, what was used longest ago goes first, later steps before earlier ones; what does not fit then is
    not kept, and its tokens are run again when they are wanted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        # The oldest first. A segment is always moved before those that it follows, so the first one has none behind it.
        self._segments: OrderedDict[StepKey, _Segment] = OrderedDict()
        self._pinned: Counter[StepKey] = Counter()

    def __len__(self) -> int:
        return len(self._segments)

    def holds(self, draft: Draft) -> bool:
        """Whether a draw can start from what is kept: all tokens of the draft but the last one."""
        if not draft.origins:
            return False
        segment = self._segments.get((draft.prompt.id, draft.origins[-1]))
        return segment is not None and segment.stop == len(draft.prompt.tokens) + len(draft.tokens) - 1

    def pin(self, draft: Draft) -> None:
        """Keep what a draft will start from until `unpin`."""
        self._pinned.update(self._chain(draft))

    def unpin(self, draft: Draft) -> None:
        """The draft has started, or will not."""
        for key in self._chain(draft):
            self._pinned[key] -= 1
            if self._pinned[key] <= 0:
                del self._pinned[key]

    def restore(self, draft: Draft, cache: KVCache, rows: Sequence[int]) -> int:
        """Put what is kept of a draft's tokens into rows of the cache, which have room; returns how many tokens."""
        chain = self._chain(draft)
        kv = torch.cat([self._segments[key].kv for key in reversed(chain)], dim=3)
        cache.restore(rows, kv)
        self._touch(chain)
        return kv.shape[3]

    def keep(self, draft: Draft, key: int, cache: KVCache, row: int, stop: int) -> None:
        """Keep what a row holds of its first `stop` tokens, as step `key` of the draft's question.

        Of a key that is one of the draft's origins, this is what leads there; of another, a step after all of them.
        """
        name = (draft.prompt.id, key)
        before = draft.origins[: draft.origins.index(key)] if key in draft.origins else draft.origins
        parent = (draft.prompt.id, before[-1]) if before else None
        if parent not in self._segments:
            parent = None
        start = self._segments[parent].stop if parent is not None else 0
        if name in self._segments or stop <= start:
            return
        size = cache.bytes_of(stop - start)
        kept = self._ancestors(parent)
        if not self._make_room(size, {*kept}):
            return
        self._segments[name] = _Segment(parent, start, cache.copy(row, start, stop))
        self._touch(kept)
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def forget(self, question: int) -> None:
        """Drop all steps of a question."""
        for key in [key for key in self._segments if key[0] == question]:
            self._drop(key)

    def clear(self) -> None:
        """Drop everything."""
        self._segments.clear()
        self._pinned.clear()
        self.num_bytes = 0

    def _make_room(self, size: int, needed: set[StepKey]) -> bool:
        """Drop unused segments until so many bytes are free; False if there are too few."""
        free = self.max_bytes - self.num_bytes
        dropped = []
        for key, segment in self._segments.items():
            if free >= size:
                break
            if key not in self._pinned and key not in needed:
                dropped.append(key)
                free += segment.num_bytes
        if free < size:
            return False
        for key in dropped:
            self._drop(key)
        return True

    def _drop(self, key: StepKey) -> None:
        self.num_bytes -= self._segments.pop(key).num_bytes

    def _chain(self, draft: Draft) -> list[StepKey]:
        """The segments that a draft starts from, the last one first."""
        return self._ancestors((draft.prompt.id, draft.origins[-1]) if draft.origins else None)

    def _ancestors(self, key: StepKey | None) -> list[StepKey]:
        found = []
        while key is not None and key in self._segments:
            found.append(key)
            key = self._segments[key].parent
        return found

    def _touch(self, chain: Sequence[StepKey]) -> None:
        for key in chain:
            self._segments.move_to_end(key)
