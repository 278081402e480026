"""Decode steps on a GPU as CUDA graphs: one call of the host in place of one a kernel.

A graph has fixed shapes and places. So a step is computed for a number of rows out of a few, those that are too many
being rows without a sequence; and tokens, positions and results have places of their own. How long the sequences are
is in the positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.pages import PagedCache

WORTH = 16  # steps of so many rows before they are recorded, which takes about as long as so many of them
Out = tuple[torch.Tensor, torch.Tensor | None]


class Steps:
    """Decode steps over one cache, recorded where that is worth it."""

    def __init__(self, decoder: Decoder, cache: PagedCache, rows: int) -> None:
        """`rows` are those of the cache."""
        self._decoder, self._cache, self._rows = decoder, cache, rows
        self._inputs = torch.zeros(2, rows, dtype=torch.int64, device=decoder.device)
        self._seen: Counter[int] = Counter()
        self._graphs: dict[int, Callable[[], Out]] = {}
        # Memory that the graphs share: no two of them run at once.
        self._pool: Any = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    def step(self, inputs: np.ndarray) -> Out:
        """`Decoder.step` of the first rows.

        Args:
            inputs: [2, N] int64, tokens and their positions.
        """
        num_rows = inputs.shape[1]
        rows = self.rows(num_rows)
        nobodys = np.array([[0], [-1]]).repeat(rows - num_rows, axis=1)
        self._inputs[:, :rows].copy_(torch.from_numpy(np.concatenate([inputs, nobodys], axis=1)))
        self._seen[rows] += 1
        if self._seen[rows] == WORTH:
            self._graphs[rows] = recorded(lambda: self._run(rows), self._pool)
        logits, experts = self._graphs[rows]() if rows in self._graphs else self._run(rows)
        return logits[:num_rows], experts[:num_rows] if experts is not None else None

    def rows(self, num_rows: int) -> int:
        """The smallest number of rows of those that are recorded: powers of two, and all."""
        return min(1 << (num_rows - 1).bit_length(), self._rows)

    def _run(self, rows: int) -> Out:
        tokens, positions = self._inputs[:, :rows]
        return self._decoder.step(tokens, positions, self._cache)


def recorded(function: Callable[[], Out], pool: Any) -> Callable[[], Out]:
    """What repeats `function` on the same places; its results are overwritten by the next repetition.

    The function is run once before, so that kernels are compiled and libraries have their workspaces; a step that is
    run twice writes the same.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = function()

    def repeat() -> Out:
        graph.replay()
        return out

    return repeat
