"""Rewrites report.html while a run goes on, in a process of its own, so that the run does not wait for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

_SHARE = 10  # a report that takes long is written again after so many times as long


class LiveReport:
    """Starts `r1engine report RUN_DIR` now and then; one at a time."""

    def __init__(self, run_dir: Path, *, every_seconds: int) -> None:
        """`every_seconds`: at least so long between two reports; 0: never one."""
        self._run_dir, self._every = run_dir, every_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._wait = float(every_seconds)

    def tick(self) -> None:
        """Begin another report if it is time for one."""
        now = time.monotonic()
        if not self._every:
            return
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._process, self._wait = None, max(self._every, _SHARE * (now - self._began))
        if now - self._began < self._wait:
            return
        self._began = now
        command = [sys.executable, "-m", "r1engine", "report", str(self._run_dir), "--live", str(self._every)]
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in launcher} | {
            "CUDA_VISIBLE_DEVICES": ""
        }
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=kept, stdin=quiet, stdout=quiet, stderr=quiet)

    def close(self) -> None:
        """End the report that is being written."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
