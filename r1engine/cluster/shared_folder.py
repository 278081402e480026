"""Whether the ranks share a file system, whether it has locks, and how fast the hosts write and read."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from r1engine.ranks import World

BIG_BYTES = 64 * 2**20
SEEN_SECONDS = 10.0  # a network file system shows a new file late


@dataclass(frozen=True)
class Seen:
    """What the ranks found."""

    problems: list[tuple[str, str]] = field(default_factory=list)  # (what was found, what to do)
    write_mb_s: dict[str, float] = field(default_factory=dict)  # host -> with the wait for the disk
    read_mb_s: dict[str, float] = field(default_factory=dict)  # host -> of what the next host wrote
    free_gb: float = 0.0


def examine(world: World, hosts: list[str], folder: Path) -> Seen:
    """Writes, reads and removes files in a new folder inside `folder`, which is there. Collective."""
    inside = folder / world.from_first(lambda: f".doctor-{secrets.token_hex(8)}")
    try:
        problems = world.everyones(_written(inside, world.rank))
        if not any(problems):
            problems = world.everyones(_read(inside, world.size))
        if any(problems):
            return Seen(_named(problems, hosts))
        return _speeds(world, hosts, inside)
    finally:
        world.everyones(None)  # all have read
        shutil.rmtree(inside, ignore_errors=True)  # each rank: where they do not share it, each has one
        world.everyones(None)


def _named(problems: list[tuple[str, str] | None], hosts: list[str]) -> list[tuple[str, str]]:
    """With the rank and the host of each."""
    return [(f"rank {rank} on {hosts[rank]}: {p[0]}", p[1]) for rank, p in enumerate(problems) if p]


def _written(inside: Path, rank: int) -> tuple[str, str] | None:
    try:
        inside.mkdir(exist_ok=True)
        with open(inside / str(rank), "w") as file:
            file.write(f"rank {rank}")
            file.flush()
            os.fsync(file.fileno())
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return f"{inside.parent} has no locks: {error.strerror}", "mount it with locks (NFS: without nolock)"
    except OSError as error:
        return f"cannot write in {inside.parent}: {error.strerror}", "take a folder that every rank can write in"
    return None


def _read(inside: Path, size: int) -> tuple[str, str] | None:
    deadline, unseen = time.monotonic() + SEEN_SECONDS, set(range(size))
    while unseen:
        for rank in list(unseen):
            with suppress(OSError):
                if (inside / str(rank)).read_text() == f"rank {rank}":
                    unseen.discard(rank)
        if unseen and time.monotonic() > deadline:
            named = ", ".join(map(str, sorted(unseen)[:8]))
            return (
                f"does not see what rank {named} wrote in {inside.parent}",
                "mount one file system under this path on all nodes",
            )
        if unseen:
            time.sleep(0.1)
    return None


def _speeds(world: World, hosts: list[str], inside: Path) -> Seen:
    names = list(dict.fromkeys(hosts))
    is_leader = world.rank == hosts.index(hosts[world.rank])
    own = names.index(hosts[world.rank])
    problem, written, read = None, 0.0, 0.0
    if is_leader:
        try:
            written = _mb_s(lambda: _write_big(inside / f"big-{own}"))
        except OSError as error:
            problem = f"writing {BIG_BYTES >> 20} MiB: {error.strerror}", "free some space, or raise the quota"
    problems = world.everyones(problem)
    if is_leader and not any(problems):
        read = _mb_s(lambda: _read_big(inside / f"big-{(own + 1) % len(names)}"))
    there = world.everyones((hosts[world.rank], written, read) if is_leader else None)
    if any(problems):
        return Seen(_named(problems, hosts))
    leaders = [entry for entry in there if entry is not None]
    free = world.from_first(lambda: shutil.disk_usage(inside).free / 1e9)
    return Seen([], {host: w for host, w, _ in leaders}, {host: r for host, _, r in leaders}, free)


def _write_big(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(os.urandom(BIG_BYTES))  # which no file system makes smaller
        file.flush()
        os.fsync(file.fileno())


def _read_big(path: Path) -> None:
    while len(path.read_bytes()) < BIG_BYTES:
        time.sleep(0.01)


def _mb_s(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return BIG_BYTES / (time.perf_counter() - began) / 1e6
