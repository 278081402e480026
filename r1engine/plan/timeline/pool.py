"""Generators with slots, which decode a token of every running sample in each step: when does which sample end?"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Sample = tuple[float, int]  # tokens, question


@dataclass
class _Generator:
    """Between two events all running samples grow by the same number of tokens: only the ends are looked at."""

    time: float = 0.0  # up to which it has worked
    steps: float = 0.0  # of decoding that it has made
    running: list[Sample] = field(default_factory=list)  # (step at which it ends, question), a heap
    waiting: deque[Sample] = field(default_factory=deque)

    def advance(self, time: float, step_seconds: Callable[[int], float]) -> float:
        """Demand until `time`; returns the tokens drawn."""
        made = (time - self.time) / step_seconds(len(self.running)) if self.running else 0.0
        self.time, self.steps = time, self.steps + made
        return made * len(self.running)

    def admit(self, slots: int) -> int:
        """Start what waits, as far as there are slots; returns how many samples."""
        started = min(slots - len(self.running), len(self.waiting))
        for _ in range(started):
            tokens, question = self.waiting.popleft()
            heapq.heappush(self.running, (self.steps + tokens, question))
        return started


class Pool:
    """All generators of a run."""

    def __init__(
        self, generators: int, slots: int, step_seconds: Callable[[int], float], prefill_seconds: float = 0.0
    ) -> None:
        """
        Args:
            generators:      that work side by side.
            slots:           samples that one of them decodes at once.
            step_seconds:    of a decoding step of so many samples.
            prefill_seconds: of a sample, before its first token.
        """
        self._slots, self._step_seconds, self._prefill = slots, step_seconds, prefill_seconds
        self._generators = [_Generator() for _ in range(generators)]
        self.tokens = 0.0  # drawn so far

    def add(self, samples: Sequence[Sample]) -> None:
        """Deal samples out, each to a generator with the fewest."""
        loads = [(len(g.running) + len(g.waiting), i) for i, g in enumerate(self._generators)]
        heapq.heapify(loads)
        for sample in samples:
            load, i = heapq.heappop(loads)
            self._generators[i].waiting.append(sample)
            heapq.heappush(loads, (load + 1, i))

    def run(self, start: float, stop: float, on_ended: Callable[[int], bool]) -> float:
        """Draw from `start` on, until `stop`, until all have ended or until `on_ended(question)` says: enough.

        Returns:
            The time of the end. Samples that have not ended keep their tokens.
        """
        events: list[tuple[float, int]] = []
        for i, generator in enumerate(self._generators):
            generator.time = start
            self._start(generator)
            self._push(events, i)
        now, is_enough = start, False
        while events and not is_enough and events[0][0] <= stop:
            now, i = heapq.heappop(events)
            generator = self._generators[i]
            self.tokens += generator.advance(now, self._step_seconds)
            while generator.running and generator.running[0][0] <= generator.steps + 1e-6:
                is_enough = on_ended(heapq.heappop(generator.running)[1]) or is_enough
            self._start(generator)
            self._push(events, i)
        now = now if is_enough or not events else stop
        for generator in self._generators:
            if generator.time < now:
                self.tokens += generator.advance(now, self._step_seconds)
        return now

    def _start(self, generator: _Generator) -> None:
        generator.time += generator.admit(self._slots) * self._prefill

    def _push(self, events: list[tuple[float, int]], i: int) -> None:
        generator = self._generators[i]
        if generator.running:
            left = generator.running[0][0] - generator.steps
            heapq.heappush(events, (generator.time + left * self._step_seconds(len(generator.running)), i))
