"""Further processes of the command that runs, which share its stages. Loads no torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from r1engine.config import ConfigError
from r1engine.cores import own_cores
from r1engine.ending import end_with_parent, exit_status


@contextmanager
def companions(run_dir: Path, processes: int) -> Iterator[None]:
    """Inside, `processes` - 1 others run the same command; each has its share of the cores.

    Their output is in process_2.log, ... of the folder. They end with this process, as by SIGTERM: they save what they
    have. One that fails stops no other: its stage is free, and fails or succeeds in another process.

    Raises:
        ConfigError: a launcher or a GPU is there, or the folder cannot be written.
    """
    if processes <= 1:
        yield
        return
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"--join: found {processes} under torchrun; required --join 1 for each launch")
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ConfigError(
            "--join: found a GPU, which the processes would share; required --join 1 for each, with a "
            "CUDA_VISIBLE_DEVICES of its own"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, own_cores() // processes)))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        others = {number: _start(run_dir / f"process_{number}.log") for number in range(2, processes + 1)}
    except OSError as error:
        raise ConfigError(
            f"--join: cannot start a process that writes in {run_dir}: {error.strerror}; required a folder to write"
        ) from error
    try:
        yield
    finally:
        for other in others.values():
            other.terminate()
        for number, other in others.items():
            if (status := other.wait()) not in (0, -signal.SIGTERM, exit_status(signal.SIGTERM)):
                print(f"process {number} ended with status {status}: {run_dir}/process_{number}.log", file=sys.stderr)


def _start(log: Path) -> subprocess.Popen[bytes]:
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)  # behind it are no options
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "r1engine", *given[:at], "--join", "1", *given[at:]],  # the last one counts
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the first process
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
