"""Turns a function of many items into one that callers hand single items to; for servers, which like many at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

_LINGER_SECONDS = 0.02  # after the first item of a batch, for others to join it

Q = TypeVar("Q")
A = TypeVar("A")


class Gatherer(Generic[Q, A]):
    """Calls a function with all items that have come in meanwhile, one call after the other; usable from any thread."""

    def __init__(self, function: Callable[[Sequence[Q]], Sequence[A]], *, most: int) -> None:
        """
        Args:
            function: of a batch of items; gives one result for each, in order.
            most: items of a batch.
        """
        self._function, self._most = function, most
        self._waiting: deque[tuple[Q, Future[A]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def submit(self, item: Q) -> Future[A]:
        """The result for one item, to come; what the function raises is raised by every future of its batch.

        Raises:
            RuntimeError: it is closed.
        """
        future: Future[A] = Future()
        with self._changed:
            if self._is_closed:
                raise RuntimeError("Gatherer: submit after close")
            self._waiting.append((item, future))
            if self._thread is None:
                # A daemon: a server that does not answer must not keep the program from ending.
                self._thread = threading.Thread(target=self._serve, name="reward servers", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancels what waits; a batch that is under way is left to itself."""
        with self._changed:
            self._is_closed = True
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._changed.notify()

    def _serve(self) -> None:
        while batch := self._next():
            try:
                results = self._function([item for item, _ in batch])
                for (_, future), result in zip(batch, results, strict=True):
                    future.set_result(result)
            except Exception as error:  # every caller of the batch is told
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)

    def _next(self) -> list[tuple[Q, Future[A]]]:
        """The next batch; empty once it is closed."""
        batch: list[tuple[Q, Future[A]]] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                self._changed.wait_for(lambda: len(self._waiting) >= self._most or self._is_closed, _LINGER_SECONDS)
                if self._is_closed:
                    break
                found = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [entry for entry in found if entry[1].set_running_or_notify_cancel()]
        return batch
