"""Keys and values of steps that may be drawn from again.

A row of the decoder holds the keys and values of all its tokens but the last one, which is not run yet. What a step
leaves is that part of its row that the steps before it do not have: from their last token up to its own last but one.
So a draw from a step runs its own new tokens and nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1engine.rollout.draft import Draft
from r1engine.rollout.local.cache import Cache, bytes_of
from r1engine.rollout.local.kept import KeptSegments, Segment

StepKey = tuple[int, int]  # question, step


@dataclass(frozen=True)
class _Step(Segment[StepKey]):
    start: int  # index of its first token in the sequence

    @property
    def stop(self) -> int:
        return self.start + self.kv.shape[3]


class KVStore(KeptSegments[StepKey, _Step]):
    """Steps by (question, step); the tokens of one that is not kept are run again when they are wanted."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._pinned: Counter[StepKey] = Counter()

    def holds(self, draft: Draft) -> bool:
        """Whether a draw can start from what is kept: all tokens of the draft but the last one."""
        if not draft.origins:
            return False
        segment = self.get((draft.prompt.id, draft.origins[-1]))
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

    def restore(self, draft: Draft, cache: Cache, rows: Sequence[int]) -> int:
        """Put what is kept of a draft's tokens into rows of the cache, which have room; returns how many tokens."""
        chain = self._chain(draft)
        kv = torch.cat([self._segments[key].kv for key in reversed(chain)], dim=3)
        cache.restore(rows, list(kv))
        self.touch(chain)
        return kv.shape[3]

    def keep(self, draft: Draft, key: int, cache: Cache, row: int, stop: int) -> None:
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
        size = bytes_of(cache, stop - start)
        if self.make_room(size, {*self.chain(parent), *self._pinned}):
            self.put(name, _Step(parent, cache.copy(row, start, stop), start))

    def forget(self, question: int) -> None:
        """Drop all steps of a question."""
        for key in [key for key in self._segments if key[0] == question]:
            self.drop(key)

    def clear(self) -> None:
        """Drop everything."""
        super().clear()
        self._pinned.clear()

    def _chain(self, draft: Draft) -> list[StepKey]:
        """The segments that a draft starts from, the last one first."""
        return self.chain((draft.prompt.id, draft.origins[-1]) if draft.origins else None)
