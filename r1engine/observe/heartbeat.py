"""heartbeat.json in the run folder: what the run was doing when it last moved. A watchdog looks at its age."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from r1engine.observe.starts import now

NAME = "heartbeat.json"
EVERY_SECONDS = 1.0  # a phase may count thousands of units a second


class Heartbeat:
    """Written where progress is told, so that a run that hangs has an old one."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = run_dir / NAME, clock
        self._beaten = -EVERY_SECONDS

    def beat(self, phase: str, done: int, step: int, steps: int) -> None:
        """
        Args:
            phase: what is going on.
            done:  units of it that are done.
            step:  optimizer steps done, of `steps`; both 0 before the first stride.
            steps: of the run.
        """
        if self._clock() - self._beaten < EVERY_SECONDS:
            return
        self._beaten = self._clock()
        row = {"time": now(), "phase": phase, "done": done, "step": step, "steps": steps}
        text = json.dumps(row | {"host": socket.gethostname(), "pid": os.getpid()})
        temporary = self._path.with_suffix(".tmp")
        with suppress(OSError):  # a full disk ends the run where it loses something, not here
            temporary.write_text(text + "\n")
            os.replace(temporary, self._path)
