"""Keys and values of prefixes that are wanted again: a tree of segments, within a bound of memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Segment(Generic[Key]):
    """What a sequence has more than the part of it before."""

    parent: Key | None  # the part before; None: there is none
    kv: torch.Tensor  # [layers, parts, heads, own tokens, numbers]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return self.kv.numel() * self.kv.element_size()


SegmentT = TypeVar("SegmentT", bound=Segment[Any])


class KeptSegments(Generic[Key, SegmentT]):
    """Segments by key. A segment is there only with all that come before it.

    Where memory ends, what was used longest ago goes first, later segments before earlier ones; what does not fit then
    is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        # The oldest first. A segment is always moved before those that it follows, so the first one has none behind it.
        self._segments: OrderedDict[Key, SegmentT] = OrderedDict()

    def __len__(self) -> int:
        return len(self._segments)

    def get(self, key: Key) -> SegmentT | None:
        """The segment of a key, if it is kept."""
        return self._segments.get(key)

    def chain(self, key: Key | None) -> list[Key]:
        """A key and those of all segments before it, the last one first; [] where it is not kept."""
        found = []
        while key is not None and key in self._segments:
            found.append(key)
            key = self._segments[key].parent
        return found

    def touch(self, chain: Sequence[Key]) -> None:
        """These were used, the last one first."""
        for key in chain:
            self._segments.move_to_end(key)

    def make_room(self, size: int, needed: AbstractSet[Key]) -> bool:
        """Drop other segments than those needed until so many bytes are free; False, and none, if there are too few."""
        free = self.max_bytes - self.num_bytes
        dropped = []
        for key, segment in self._segments.items():
            if free >= size:
                break
            if key not in needed:
                dropped.append(key)
                free += segment.num_bytes
        if free < size:
            return False
        for key in dropped:
            self.drop(key)
        return True

    def put(self, key: Key, segment: SegmentT) -> None:
        """Keep a segment for which there is room; what is before it was used, too."""
        self._segments[key] = segment
        self.touch(self.chain(segment.parent))
        self.num_bytes += segment.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def drop(self, key: Key) -> None:
        """Keep a segment no longer, behind which there is none."""
        self.num_bytes -= self._segments.pop(key).num_bytes

    def clear(self) -> None:
        """Drop everything."""
        self._segments.clear()
        self.num_bytes = 0
