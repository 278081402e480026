"""One run a folder: a lock that its process holds, and the proof that every rank sees the folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from r1engine.config import ConfigError
from r1engine.ranks import World

NAME = ".lock"
SEEN_SECONDS = 10.0  # a network file system shows a new file late


@contextmanager
def held(run_dir: Path, world: World) -> Iterator[None]:
    """Inside, the run folder belongs to this run. Collective; the lock ends with its process, however that ends.

    Raises:
        ConfigError: another run has it, it cannot be written, or a rank does not see it.
    """
    file: BinaryIO | None = None

    def take() -> bytes:
        nonlocal file
        file, token = _taken(run_dir)
        return token

    token = world.from_first(take)
    try:
        # Not on the first rank: a lock of the POSIX kind ends when its process closes the file, however it was opened.
        seen = world.everyones((file is not None or _sees(run_dir / NAME, token), socket.gethostname()))
        if blind := sorted({host for sees, host in seen if not sees}):
            raise ConfigError(
                f"run_dir: {run_dir} on {', '.join(blind)} is not what the first rank has; required a file system "
                "that all ranks share"
            )
        yield
    finally:
        if file is not None:
            file.close()


def _taken(run_dir: Path) -> tuple[BinaryIO, bytes]:
    """The locked file, and what stands in it."""
    token = f"process {os.getpid()} on {socket.gethostname()}".encode()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / NAME, "a+b")  # noqa: SIM115 (closing it ends the lock)
    except OSError as error:
        raise ConfigError(
            f"run_dir: cannot write in {run_dir}: {error.strerror}; required a folder to write"
        ) from error
    try:
        # Of the POSIX kind: a fork does not inherit it, and network file systems have it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().decode(errors="replace")
        file.close()
        if isinstance(error, BlockingIOError | PermissionError):
            raise ConfigError(f"run_dir: {run_dir} is in use by {owner}; required another run_dir") from error
        raise ConfigError(f"run_dir: the file system of {run_dir} has no locks: {error.strerror}") from error
    file.seek(0)
    file.truncate()
    file.write(token)
    file.flush()
    return file, token


def _sees(path: Path, token: bytes) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path.is_file() and path.read_bytes() == token):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
