"""What a signal to end does: a run ends at its next boundary with a checkpoint; where nothing is to be saved, at once.

SIGINT is Ctrl-C; SIGTERM is a scheduler's or a launcher's; SIGUSR1 is Slurm's warning before its time limit
(sbatch --signal). A second signal ends at once. No torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on what the terminal or the scheduler has sent to every process: within this time it is one signal.
PASSED_ON_SECONDS = 3.0


class Ended(Exception):
    """A run has ended because a signal asked for it. The message says what is saved."""

    def __init__(self, number: int, message: str) -> None:
        """Of signal `number`."""
        super().__init__(message)
        self.status = exit_status(number)


def exit_status(number: int) -> int:
    """That a shell shows: 130 for SIGINT; 143 for SIGTERM, and for SIGUSR1, which asks for the same."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def end_with_parent(number: int) -> None:
    """From here on the kernel sends this process signal `number` when its parent ends, killed or not. Linux alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class Ending:
    """Listens to the signals that end a run. Use as a context manager, in the main thread.

    A thread listens, woken by the C handler: a second signal works also where the main thread waits in a collective
    that never ends.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that came
        self._asked_at = 0.0
        self._prospect: Callable[[], str] | None = None
        self._speaks = os.environ.get("RANK", "0") == "0"
        self._same_seconds = PASSED_ON_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._owner = 0

    def __enter__(self) -> Self:
        self._owner = os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        os.register_at_fork(after_in_child=self._forget)
        # A parent that ignores a signal, as nohup does, wants it ignored.
        self._handlers = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._handlers:
            signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._listen, name="ending", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._owner = 0
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    @contextmanager
    def at_boundaries(self, prospect: Callable[[], str]) -> Iterator[None]:
        """Inside, a signal is noted in `asked`, for the run to end at its next boundary.

        Args:
            prospect: what to say when it comes: when the run will end, with what.
        """
        self._prospect = prospect
        try:
            yield
        finally:
            self._prospect = None

    def _listen(self) -> None:
        while received := os.read(self._read, 1):
            if received[0] in self._handlers:
                self._on_signal(received[0])

    def _on_signal(self, number: int) -> None:
        name, prospect = signal.Signals(number).name, self._prospect
        if self.asked is None and prospect is not None:
            self.asked, self._asked_at = number, time.monotonic()
            self._say(f"{name}: {prospect()}; a second signal ends it at once")
        elif self.asked is None:
            self._exit(
                number,
                f"{name}: ended outside of training; the same command goes on from the last checkpoint, "
                "or from the beginning if there is none",
            )
        elif time.monotonic() - self._asked_at > self._same_seconds:
            self._exit(number, f"{name}: ended at once; what came after the last checkpoint is not saved")

    def _exit(self, number: int, text: str) -> None:
        """Also where the main thread cannot be reached. Child processes end with their parent."""
        self._say(text)
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # the progress bar hides the cursor
        os._exit(exit_status(number))

    def _say(self, text: str) -> None:
        if self._speaks:
            os.write(2, f"{text}\n".encode())

    def _forget(self) -> None:
        """In a fork, such as a writer of shards: what it is sent is not for the parent; Ctrl-C does not end it."""
        if self._owner:
            self._owner = 0
            signal.set_wakeup_fd(-1)
            for number in self._handlers:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
