"""A failed run in a few lines: where it failed, what is saved, what to do. On the screen and in failure.json."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1engine.observe.put import put_json
from r1engine.observe.starts import now

NAME = "failure.json"


@dataclass(frozen=True)
class Failure:
    """What is known of it."""

    run_dir: str
    rank: int
    ranks: int
    phase: str  # what was going on
    step: int  # optimizer steps done
    steps: int | None  # of the whole run; None: it was not built yet
    checkpoint: str | None  # the last good one
    error: str

    def text(self) -> str:
        """For the screen."""
        of = f" of {self.steps}" if self.steps is not None else ""
        lines = [
            f"the run failed on rank {self.rank} of {self.ranks} ({socket.gethostname()}) at step {self.step}{of}, "
            f"phase: {self.phase or 'start'}",
            f"  error: {self.error}",
            f"  last good checkpoint: {self.checkpoint or 'none'}",
            f"  what to do: mend the cause; the same command goes on from "
            f"{self.checkpoint or 'the beginning, since there is no checkpoint'}",
        ]
        return "\n".join(lines)


class RunFailed(RuntimeError):
    """A run has failed; the message is the summary, on the rank that failed first."""


def failed(failure: Failure, error: Exception) -> RunFailed:
    """The exception that tells of it; failure.json has the traceback, too."""
    told = failure.text()
    content = {"failed": now(), "host": socket.gethostname(), "process": os.getpid(), **asdict(failure)}
    content["traceback"] = traceback.format_exception(error)
    path = _written(content, Path(failure.run_dir))
    return RunFailed(f"{told}\n  traceback: {path}" if path else f"{told}\n{''.join(content['traceback'])}")


def _written(content: dict[str, Any], run_dir: Path) -> Path | None:
    """failure.json in the folder of the run or, where that has no space or may not be written, in a temporary one."""
    for make in (lambda: run_dir, lambda: Path(tempfile.mkdtemp(prefix="r1engine-"))):
        with suppress(OSError):
            path = make() / NAME
            put_json(path, content)
            return path
    return None
