"""Decode steps on a GPU as CUDA graphs: one call of the host in place of one a kernel.

A graph has fixed shapes and places. So a step is computed for a number of rows and a number of columns out of a few,
the rows that are too many being dead ones of the cache; and tokens, positions and results have places of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from r1engine.rollout.local.cache import GROWTH, KVCache, in_blocks
from r1engine.rollout.local.decoder import Decoder

WORTH = 16  # steps of a shape before it is recorded, which takes about as long as so many of them
SHORTEST = 256  # columns; the next numbers of them are GROWTH times as many
Out = tuple[torch.Tensor, torch.Tensor | None]


class Shape(NamedTuple):
    """Of a step."""

    rows: int
    columns: int


class Steps:
    """Decode steps over one cache, recorded where that is worth it."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: int, limit: int) -> None:
        """`rows` and `limit` are those of the cache."""
        self._decoder, self._cache, self._rows, self._limit = decoder, cache, rows, limit
        self._inputs = torch.zeros(2, rows, dtype=torch.int64, device=decoder.device)
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, Callable[[], Out]] = {}
        # Memory that the graphs share: no two of them run at once.
        self._pool: Any = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    def step(self, inputs: np.ndarray, length: int) -> Out:
        """`Decoder.step` of the first rows.

        Args:
            inputs: [2, N] int64, tokens and their positions.
            length: the largest position and one.
        """
        num_rows = inputs.shape[1]
        shape = self.shape(num_rows, length)
        self._inputs[:, :num_rows].copy_(torch.from_numpy(inputs))
        self._seen[shape] += 1
        if self._seen[shape] == WORTH:
            self._graphs[shape] = recorded(lambda: self._run(shape), self._pool)
        logits, experts = self._graphs[shape]() if shape in self._graphs else self._run(shape)
        return logits[:num_rows], experts[:num_rows] if experts is not None else None

    def shape(self, num_rows: int, length: int) -> Shape:
        """The smallest shape of those that are recorded: powers of two of rows, and columns that grow by GROWTH."""
        columns = SHORTEST
        while columns < length:
            columns = int(columns * GROWTH)
        rows = min(1 << (num_rows - 1).bit_length(), self._rows)
        return Shape(rows, min(in_blocks(columns), in_blocks(self._limit)))

    def _run(self, shape: Shape) -> Out:
        tokens, positions = self._inputs[:, : shape.rows]
        return self._decoder.step(tokens, positions, self._cache, length=shape.columns)


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
