"""What a rank answers from inside when `r1engine doctor RUN_DIR` asks: its stack, and what it waits for.

The question is the file stall/ask, which a thread of every rank looks for; an answer is the file stall/RANK.json. The
collectives come from PyTorch's flight recorder, which is on by default (TORCH_FR_BUFFER_SIZE) for NCCL and gloo.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from r1engine.observe.put import put_text

FOLDER, QUESTION = "stall", "ask"
LOOK_SECONDS = 2.0  # between two looks for a question
FRAMES = 12  # innermost ones of the stack


class Answers:
    """The thread of a rank that answers."""

    def __init__(self, run_dir: Path, rank: int, every_seconds: float = LOOK_SECONDS) -> None:
        """
        Args:
            run_dir:       of the run.
            rank:          of this process, whose main thread is told of.
            every_seconds: between two looks.
        """
        self._folder, self._rank, self._every = run_dir / FOLDER, rank, every_seconds
        self._last = ""  # a question that was there before is answered, too
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="answers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._ended.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._ended.wait(self._every):
            question = _question(self._folder)
            if question and question != self._last:
                self._last = question
                with suppress(OSError):  # a full disk ends the run where it loses something, not here
                    answer = json.dumps({"question": question} | _answer(self._rank))
                    put_text(self._folder / f"{self._rank}.json", answer, is_lasting=False)


def _question(folder: Path) -> str:
    try:
        return (folder / QUESTION).read_text()
    except OSError:
        return ""


def _answer(rank: int) -> dict[str, Any]:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
    groups, entries = _collectives()
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time_ns": time.time_ns(),
        "stack": [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in stack],
        "groups": groups,
        "entries": entries,
    }


def _collectives() -> tuple[dict[str, list[int]], list[dict[str, Any]] | None]:
    """Name of each group -> its ranks, and what the flight recorder holds; None: it is off, or PyTorch has none."""
    import torch
    import torch.distributed as dist

    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)  # not in every version
    if not dist.is_initialized() or dump is None:
        return {}, None
    names = list(dist.distributed_c10d._world.pg_names.items())
    groups = {str(name): list(dist.get_process_group_ranks(group)) for group, name in names}
    return groups, json.loads(dump()).get("entries")
