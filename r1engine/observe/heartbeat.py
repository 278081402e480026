"""heartbeat.json in the run folder: what the run was doing when it last moved. A watchdog looks at its age.

The first rank writes it; heartbeats/RANK.json are those of the others, which write at each phase.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from r1engine.observe.put import put_text
from r1engine.observe.starts import now

NAME, OTHERS = "heartbeat.json", "heartbeats"
EVERY_SECONDS = 1.0  # between two of one phase, which may count thousands of units a second


class Heartbeat:
    """Written where progress is told, so that a run that hangs has an old one."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic, *, rank: int = 0) -> None:
        """The first rank takes away what the others of an earlier start have left."""
        if rank == 0:
            rmtree(run_dir / OTHERS, ignore_errors=True)
        self._path = run_dir / OTHERS / f"{rank}.json" if rank else run_dir / NAME
        self._clock, self._phase = clock, ""
        self._beaten = -EVERY_SECONDS

    def beat(self, phase: str, done: int, step: int, steps: int) -> None:
        """
        Args:
            phase: what is going on.
            done:  units of it that are done.
            step:  optimizer steps done, of `steps`; both 0 before the first stride.
            steps: of the run.
        """
        if self._clock() - self._beaten < EVERY_SECONDS and phase == self._phase:
            return
        self._beaten, self._phase = self._clock(), phase
        row = {"time": now(), "phase": phase, "done": done, "step": step, "steps": steps}
        text = json.dumps(row | {"host": socket.gethostname(), "pid": os.getpid()})
        with suppress(OSError):  # a full disk ends the run where it loses something, not here
            if self._path.parent.name == OTHERS:
                self._path.parent.mkdir(exist_ok=True)
            put_text(self._path, text + "\n", is_lasting=False)
