"""The embedded generator with keys and values in pages, as on a GPU; attention is the reference of the kernel."""

from __future__ import annotations

from pathlib import Path

import torch

from r1engine.hf.folder import weights_of
from r1engine.rollout.draft import Draft
from r1engine.rollout.local import pages
from r1engine.rollout.local.generator import LocalGenerator

CPU = torch.device("cpu")


def local_generator(folder: Path, slots: int = 5, num_pages: int | None = None) -> LocalGenerator:
    """With the folder's weights; None: as a CPU has it."""
    options = {"seed": 3, "slots": slots, "device": CPU, "dtype": torch.float32}
    generator = LocalGenerator(folder, **options) if num_pages is None else PagedGenerator(folder, num_pages, options)
    generator.load_weights(weights_of(folder))
    return generator


class PagedGenerator(LocalGenerator):
    """`cache` is that of the last draw, `moved` how many drafts went to the host in all draws."""

    def __init__(self, folder: Path, num_pages: int, options: dict) -> None:
        super().__init__(folder, **options)
        self._num_pages, self.moved = num_pages, 0
        self.cache: pages.PagedCache

    def _cache_for(self, drafts: list[Draft]) -> pages.PagedCache:
        longest = max(len(draft.prompt.tokens) + draft.max_tokens for draft in drafts)
        shape = {"rows": min(self._slots, len(drafts)), "limit": longest, "pages": self._num_pages}
        self.cache = pages.PagedCache(self._decoder.arch, **shape, device=CPU, dtype=torch.float32)
        set_aside = self.cache.set_aside

        def counted(row: int, length: int) -> list[torch.Tensor]:
            self.moved += 1
            return set_aside(row, length)

        self.cache.set_aside = counted
        return self.cache
