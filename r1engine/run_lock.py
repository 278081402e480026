"""Who works in a folder: a lock that a process holds, and the proof that every rank sees the folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from r1engine.config import ConfigError

if TYPE_CHECKING:
    from r1engine.ranks import World


NAME = ".lock"
SEEN_SECONDS = 10.0  # a network file system shows a new file late


@contextmanager
def held(run_dir: Path, world: World, *, is_shared: bool = False) -> Iterator[None]:
    """Inside, the run folder belongs to this run. Collective; the lock ends with its process, however that ends.

    Args:
        run_dir:   the folder.
        world:     the ranks of the run.
        is_shared: other runs that share it may have it, too.

    Raises:
        ConfigError: another run has it, it cannot be written, or a rank does not see it.
    """
    file: BinaryIO | None = None

    def take() -> bytes:
        nonlocal file
        file = _taken(run_dir, is_shared)
        return _own_name().encode()

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


def _taken(run_dir: Path, is_shared: bool) -> BinaryIO:
    """The locked file."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return locked(run_dir / NAME, is_shared=is_shared)
    except BlockingIOError as error:
        raise ConfigError(f"run_dir: {run_dir} is in use by {error}; required another run_dir") from error
    except OSError as error:
        needed = "a folder to write, on a file system with locks"
        raise ConfigError(f"run_dir: cannot write in {run_dir}: {error.strerror}; required {needed}") from error


def _own_name() -> str:
    """What a lock says of the process that has it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def locked(path: Path, *, is_shared: bool = False) -> BinaryIO:
    """A file that this process has until it closes it or ends. It names those that have it, a line each.

    Raises:
        BlockingIOError: others have it; the message names them.
        OSError: it cannot be written, or its file system has no locks.
    """
    file = open(path, "a+b")  # noqa: SIM115 (closing it ends the lock)
    try:
        # Of the POSIX kind: a fork does not inherit it, and network file systems have it.
        fcntl.lockf(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owners = file.read().decode(errors="replace").split("\n")
        file.close()
        if isinstance(error, BlockingIOError | PermissionError):  # what a lock that others have looks like
            raise BlockingIOError(", ".join(filter(None, owners))) from error
        raise
    if not is_shared:
        file.truncate(0)
    file.write(f"{_own_name()}\n".encode())
    file.flush()
    return file


def _sees(path: Path, token: bytes) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path.is_file() and token in path.read_bytes().split(b"\n")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
