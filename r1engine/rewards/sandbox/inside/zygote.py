"""Process 1 of a sandbox: imports what programs use, gives up its privileges, then forks a child for each program.

Speaks packets over the socket on descriptor 0 with the process that started it:

    argv    JSON: uid (null: stay), landlock, seccomp, namespaces, readable, scratch, modules, paths
    hello   {"pid", "uid"}
    order   {"mode", "argument", "limits"} + descriptors: stdin, stdout, stderr, program, channel[, compiled]
    result  {"status": what os.waitpid says, "cpu", "wall", "late": bool, "dirty": bool}

A child is killed at its deadline, or when "stop" comes while it runs. Then everything else in the process
namespace is killed. All ends when the socket closes.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import lockdown
import programs

STOP = b"stop"
COMMON = (
    "abc array ast base64 bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal enum "
    "fractions functools hashlib heapq inspect io itertools json math numbers operator os pprint random re secrets "
    "statistics string struct textwrap time typing unicodedata uuid"
)


def main(setup: dict[str, Any]) -> int:
    link = socket.socket(fileno=os.dup(0))
    link.set_inheritable(False)
    empty = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1):
        os.dup2(empty, number)
    os.close(empty)
    sys.path[:0] = setup["paths"]
    for name in [*COMMON.split(), *setup["modules"]]:
        importlib.import_module(name)
    if setup["uid"] is not None:
        os.setgroups([])
        os.setresgid(setup["uid"], setup["uid"], setup["uid"])
        os.setresuid(setup["uid"], setup["uid"], setup["uid"])
        if not os.access(os.__file__, os.R_OK):
            sys.exit(f"user {setup['uid']} may not read Python's own files, {os.__file__}; install it elsewhere")
    lockdown.give_up_privileges()
    if setup["landlock"]:
        lockdown.restrict_files(setup["readable"], [setup["scratch"]])
    setup["clean"] = sorted(os.listdir(setup["scratch"]))
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of the parent
    link.send(json.dumps({"pid": os.getpid(), "uid": os.getuid()}).encode())
    while True:
        packet, numbers, _, _ = socket.recv_fds(link, 2**16, 8)
        if not packet:
            return 0
        if packet != STOP:  # it may come too late
            link.send(json.dumps(_serve(link, json.loads(packet), numbers, setup)).encode())


def _serve(link: socket.socket, order: dict[str, Any], numbers: list[int], setup: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        link.close()
        _become(order, numbers, setup)
    watch = os.pidfd_open(child)
    ready = _wait(child, watch, link, order["limits"]["wall_seconds"])
    if watch not in ready and link.fileno() in ready and link.recv(1024) != STOP:
        os._exit(0)  # the other side is gone
    _end(child, setup["namespaces"])
    _, status, usage = os.wait4(child, 0)
    wall = time.monotonic() - started
    os.close(watch)
    if setup["namespaces"]:
        _end_everyone()
    if order["mode"] == "compile" and status == 0:
        _move(os.path.join(setup["scratch"], "program"), numbers[5])
    for number in numbers:
        os.close(number)
    return {
        "status": status,
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": wall,
        "late": not ready,
        "dirty": sorted(os.listdir(setup["scratch"])) != setup["clean"],
    }


def _wait(child: int, watch: int, link: socket.socket, wall_seconds: float) -> set[int]:
    """Descriptors with news: the child has ended, a packet has come; empty at the deadline.

    A program that computes gets four times as long: on a busy machine its processor time comes slowly.
    """
    waiting = select.poll()
    waiting.register(watch, select.POLLIN)
    waiting.register(link, select.POLLIN)
    ready = waiting.poll(wall_seconds * 1000)
    if not ready and time.clock_gettime(~child << 3 | 2) > 0.1 * wall_seconds:  # the child's clock of processor time
        ready = waiting.poll(3 * wall_seconds * 1000)
    return {number for number, _ in ready}


def _become(order: dict[str, Any], numbers: list[int], setup: dict[str, Any]) -> None:
    """Turns a fresh child into the program; does not return."""
    status = 70
    try:
        os.setsid()
        mode, limits = order["mode"], order["limits"]
        for target, number in enumerate(numbers[:5]):
            os.dup2(number, target + 100)
        for target in range(5):
            os.dup2(target + 100, target)
        os.closerange(5, 256)
        if mode in ("binary", "compile"):
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # the interpreter changed these
                signal.signal(number, signal.SIG_DFL)
        lockdown.limit(
            cpu_seconds=limits["cpu_seconds"],
            memory_bytes=limits["memory_bytes"],
            file_bytes=limits["output_bytes"],
            processes=limits["processes"] if setup["namespaces"] or setup["uid"] is not None else None,
        )
        if setup["seccomp"]:
            lockdown.restrict_calls(may_fork=limits["may_fork"])
        status = programs.run(mode, order["argument"], setup["scratch"], program=3, channel=4)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def _end(child: int, has_namespace: bool) -> None:
    if not has_namespace:
        with suppress(ProcessLookupError):  # it had no time to make its group
            os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)


def _end_everyone() -> None:
    """Kills all processes of the namespace but this one, its first, and waits until they are gone."""
    while True:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _move(path: str, number: int) -> None:
    with open(path, "rb") as file:
        while part := file.read(2**20):
            os.write(number, part)
    os.unlink(path)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
