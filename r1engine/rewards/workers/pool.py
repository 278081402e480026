"""Killable worker processes: a function over items, with a deadline, a memory limit and an outcome for each item.

The parent owns the deadlines: a worker that does not answer in time is killed (SIGKILL) and replaced, that one and
no other. No signal-based time-outs: they work on the main thread only, and the code that they interrupt can swallow
them. Items and results travel as JSON, so nothing that a worker says is ever executed here.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from r1engine.rewards.workers.nursery import HEADER, MEMORY_STATUS, Nursery, WarmUp

MAX_RESULT_BYTES = 4 * 2**20
_FORK_TRIES = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What came of one item."""

    value: Any  # what the function returned; None if there is a problem
    problem: str  # "" or why there is no value, in one line
    seconds: float  # from when a worker got the item until this was known


@dataclass
class _Item:
    message: bytes
    future: Future[Outcome]


@dataclass
class _Worker:
    pid: int
    link: socket.socket
    item: _Item | None = None
    started: float = 0.0
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    incoming: bytearray = field(default_factory=bytearray)


class WorkerPool:
    """Calls a function on items in warm child processes; usable from any thread, and with `run` from asyncio.

    The processes start with the first item. The workers are forked from a process that has imported the function's
    module and called what warms it up.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int,
        deadline_seconds: float,
        memory_gb: float = 4.0,
        max_pending: int | None = None,
        warm_up: Sequence[WarmUp] = (),
        variables: Sequence[str] = (),
    ) -> None:
        """
        Args:
            function: "module:name" of a function of one JSON value that returns a JSON value.
            workers: number of child processes.
            deadline_seconds: of one item, from when a worker gets it; then that worker is killed.
            memory_gb: address space of a worker (GiB).
            max_pending: items waiting or being worked on at which `submit` blocks; None: 64 a worker.
            warm_up: what loads what the function needs, "module:name" and arguments of each.
            variables: of the environment, for the workers.

        Raises:
            ValueError: a number is not positive.
        """
        room = 64 * workers if max_pending is None else max_pending
        _check_positive(workers=workers, deadline_seconds=deadline_seconds, memory_gb=memory_gb, max_pending=room)
        self.size, self.deadline_seconds = workers, deadline_seconds
        self._nursery = Nursery(function, int(memory_gb * 2**30), warm_up, variables)
        self._room = threading.BoundedSemaphore(room)
        self._lock = threading.Lock()  # of _waiting, _thread and _closed
        self._waiting: deque[_Item] = deque()
        self._thread: threading.Thread | None = None
        self._closed = ""  # why, once it is
        self._workers: list[_Worker] = []  # this and the selector belong to the thread
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)

    # ------------------------------------------------------------------ for callers

    def submit(self, item: Any) -> Future[Outcome]:
        """Hands in one item; blocks while `max_pending` items are under way.

        What the function raises, a crash and a missed deadline are outcomes with a problem. The future raises
        RuntimeError only if no worker can be started at all.

        Raises:
            RuntimeError: the pool is closed.
            TypeError: the item is no JSON value.
        """
        text = json.dumps(item).encode()
        entry = _Item(HEADER.pack(len(text)) + text, Future())
        self._room.acquire()
        with self._lock:
            if self._closed:
                self._room.release()
                raise RuntimeError(f"WorkerPool: submit after close ({self._closed})")
            entry.future.add_done_callback(lambda _: self._room.release())
            self._waiting.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="reward workers", daemon=True)
                self._thread.start()
        self._call()
        return entry.future

    def map(self, items: Iterable[Any], on_done: Callable[[Outcome], None] | None = None) -> list[Outcome]:
        """Outcomes of all items, in the order of the items; see `in_order`."""
        return in_order(self.submit, items, on_done)

    async def run(self, item: Any) -> Outcome:
        """`submit` for asyncio: neither waiting for room nor for the outcome blocks the loop."""
        return await asyncio.wrap_future(await asyncio.to_thread(self.submit, item))

    def close(self) -> None:
        """Kills the workers and waits until they are gone. Items under way have the problem "the pool was closed"."""
        with self._lock:
            self._closed = self._closed or "the pool was closed"
            thread = self._thread
        if thread is not None:
            self._call()
            thread.join()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self) -> None:
        """Wakes the thread."""
        with suppress(OSError):  # full: it is awake anyway; closed: it has ended
            self._wake.send(b"!")

    # ------------------------------------------------------------------ the thread that owns the workers

    def _serve(self) -> None:
        failure: Exception | None = None
        try:
            self._nursery.start()
            while not self._closed:
                self._fill()
                self._assign()
                for key, events in self._selector.select(self._seconds_left()):
                    if key.data is None:
                        self._woken.recv(65536)
                    else:
                        self._exchange(key.data, events)
                self._enforce_deadlines()
        except Exception as error:  # of the machine, such as no memory for a process: every caller is told
            failure = error
        self._end(failure)

    def _fill(self) -> None:
        """Forks until there are as many workers as there should be."""
        tries = 0
        while len(self._workers) < self.size:
            try:
                worker = _Worker(*self._nursery.fork())
            except RuntimeError:
                tries += 1
                if tries == _FORK_TRIES:
                    raise
                self._nursery.start()
                continue
            self._workers.append(worker)
            self._selector.register(worker.link, selectors.EVENT_READ, worker)

    def _assign(self) -> None:
        """Gives waiting items to idle workers."""
        for worker in self._workers:
            while worker.item is None:
                with self._lock:
                    if not self._waiting:
                        return
                    item = self._waiting.popleft()
                if item.future.set_running_or_notify_cancel():  # else it was cancelled while it waited
                    worker.item, worker.started, worker.outgoing = item, time.monotonic(), memoryview(item.message)
                    self._send(worker)

    def _exchange(self, worker: _Worker, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(worker)
        if events & selectors.EVENT_READ:
            self._read(worker)

    def _send(self, worker: _Worker) -> None:
        """Sends what the link takes without blocking; a worker that does not read must not hold up the others."""
        try:
            while worker.outgoing:
                worker.outgoing = worker.outgoing[worker.link.send(worker.outgoing) :]
        except BlockingIOError:
            self._selector.modify(worker.link, selectors.EVENT_READ | selectors.EVENT_WRITE, worker)
            return
        except OSError:
            return  # it has died; reading will tell
        self._selector.modify(worker.link, selectors.EVENT_READ, worker)

    def _read(self, worker: _Worker) -> None:
        try:
            data = worker.link.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._replace(worker, None)
            return
        worker.incoming += data
        size = HEADER.unpack_from(worker.incoming)[0] if len(worker.incoming) >= HEADER.size else 0
        if size > MAX_RESULT_BYTES or worker.item is None:
            self._replace(worker, f"a result of more than {MAX_RESULT_BYTES} bytes")
        elif len(worker.incoming) >= HEADER.size + size and size:
            try:
                reply = json.loads(bytes(worker.incoming[HEADER.size :]))
                value, problem = reply.get("value"), str(reply.get("error", ""))
            except (ValueError, AttributeError, RecursionError):
                self._replace(worker, "an unreadable result")
                return
            worker.incoming.clear()
            self._finish(worker, value, problem)

    def _enforce_deadlines(self) -> None:
        clock = time.monotonic()
        for worker in list(self._workers):
            if worker.item is not None and clock - worker.started >= self.deadline_seconds:
                self._replace(worker, f"no result within {self.deadline_seconds:g} s")

    def _replace(self, worker: _Worker, problem: str | None) -> None:
        """Kills one worker and ends its item; None: the worker died by itself, and its status says how."""
        self._workers.remove(worker)
        self._selector.unregister(worker.link)
        worker.link.close()
        if problem is not None:
            self._finish(worker, None, problem)  # first: taking down a large process takes a while
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
        status = self._nursery.reap(worker.pid)
        self._finish(worker, None, _cause_of_death(status))

    def _finish(self, worker: _Worker, value: Any, problem: str) -> None:
        item, worker.item = worker.item, None
        if item is not None:
            item.future.set_result(Outcome(value, problem, time.monotonic() - worker.started))

    def _seconds_left(self) -> float | None:
        """Until the next deadline; None if nothing runs."""
        started = [worker.started for worker in self._workers if worker.item is not None]
        return max(0.0, min(started) + self.deadline_seconds - time.monotonic()) if started else None

    def _end(self, failure: Exception | None) -> None:
        with self._lock:
            self._closed = self._closed or f"{type(failure).__name__}: {failure}"
            waiting = [*self._waiting]
            self._waiting.clear()
        for worker in self._workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        self._nursery.stop()
        clock = time.monotonic()
        running = [(worker.item, worker.started) for worker in self._workers if worker.item is not None]
        not_begun = [(item, clock) for item in waiting if item.future.set_running_or_notify_cancel()]
        for item, started in [*running, *not_begun]:
            if failure is not None:
                item.future.set_exception(failure)
            else:
                item.future.set_result(Outcome(None, self._closed, clock - started))
        for worker in self._workers:
            worker.link.close()
        self._workers.clear()
        self._selector.close()
        self._woken.close()
        self._wake.close()


def _check_positive(**sizes: float) -> None:
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"WorkerPool: found {name} = {value}, required more than 0")


def in_order(
    submit: Callable[[Any], Future[T]], items: Iterable[Any], on_done: Callable[[T], None] | None = None
) -> list[T]:
    """Results of `submit` for all items, in the order of the items.

    Args:
        submit: hands in one item; it may block, and the items are read only as fast as it does not.
        items: any number.
        on_done: called with each result as soon as all before it are there, on this thread.
    """
    futures: deque[Future[T]] = deque()
    results: list[T] = []

    def take() -> None:
        results.append(futures.popleft().result())
        if on_done is not None:
            on_done(results[-1])

    for item in items:
        futures.append(submit(item))
        while futures and futures[0].done():
            take()
    while futures:
        take()
    return results


def _cause_of_death(status: int | None) -> str:
    if status is None:
        return "the worker died"
    if os.WIFSIGNALED(status):
        return f"the worker died of signal {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.waitstatus_to_exitcode(status)
    return "out of memory" if code == MEMORY_STATUS else f"the worker exited with status {code}"
