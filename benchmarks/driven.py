"""A rival's side: a child process in its own environment, which does a piece of work each time it is told to."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class Driven:
    """Lines of JSON over pipes. The first one holds the versions of the rival's packages."""

    def __init__(self, python: str, script: str, job: dict[str, Any]) -> None:
        """
        Args:
            python: of the child's environment.
            script: beside this file; it takes the job as its one argument.
            job:    what it is to do.
        """
        self._script = script
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(script), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = self._read()

    def ask(self, word: str) -> dict[str, Any]:
        """What the child answers when it has done one piece."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """The child ends when nothing more comes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._script} ended with status {self._process.wait()}; run it by hand")
        found: dict[str, Any] = json.loads(line)
        return found
