"""The child side of the worker pool: a warm process that imports the function once and forks workers from it.

The nursery is single-threaded, so that forking is safe, and a killed worker is replaced within milliseconds. It
speaks JSON lines over one socket with its parent:

    start  {"path": [...], "function": "module:name", "warm_up": [["module:name", arguments]], "memory_bytes": n}
                                                                 ->  {"ready": true} or {"error": text}
    fork   {"fork": true} + the worker's end of a socket pair    ->  {"pid": n}
    reap   {"reap": pid}                                         ->  {"status": what os.waitpid says}

No worker is reaped before its parent asks, so a pid that the parent kills is never somebody else's. Everything
ends with the parent: the nursery when its socket closes, a worker when its own closes or the nursery ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from r1engine.ending import end_with_parent

HEADER = struct.Struct("!I")  # bytes of the JSON text that follows, between pool and worker
MEMORY_STATUS = 77  # exit status of a worker that ran out of memory
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import r1engine.rewards.workers.nursery as n; n.main()"
)
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR")  # no tokens, no secrets
_START_SECONDS, _ORDER_SECONDS = 300.0, 30.0
_PARENT_CHECK_SECONDS = 1.0


WarmUp = tuple[str, tuple[Any, ...]]  # address of a function, and its arguments


def address(function: Callable[..., Any]) -> str:
    """Where another process finds a function of a module: "module:name"."""
    return f"{function.__module__}:{function.__qualname__}"


def function_at(where: str) -> Callable[..., Any]:
    """The function at an `address`."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


class Nursery:
    """The parent's handle of the nursery process."""

    def __init__(
        self, function: str, memory_bytes: int, warm_up: Sequence[WarmUp] = (), variables: Sequence[str] = ()
    ) -> None:
        """See `WorkerPool`."""
        self._variables = (*_KEPT_VARIABLES, *variables)
        self._start = {"path": sys.path, "function": function, "warm_up": warm_up, "memory_bytes": memory_bytes}
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Starts the process and waits until it has imported the function.

        Raises:
            RuntimeError: the function cannot be imported, or the process cannot be started.
        """
        self.stop()
        self._control, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in self._variables if name in os.environ}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._order(self._start, timeout=_START_SECONDS)

    def fork(self) -> tuple[int, socket.socket]:
        """(pid, our end of the link) of a new worker.

        Raises:
            RuntimeError: no process could be made.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._order({"fork": True}, handing=theirs)["pid"]
        ours.setblocking(False)
        return pid, ours

    def reap(self, pid: int) -> int | None:
        """Wait status of a worker that has ended; None if it is unknown."""
        try:
            return self._order({"reap": pid})["status"]
        except RuntimeError:
            return None

    def stop(self) -> None:
        """Ends the nursery and, with it, every worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._control is not None:
            self._control.close()
            self._control = None

    def _order(self, order: dict, *, handing: socket.socket | None = None, timeout: float = _ORDER_SECONDS) -> dict:
        control, process = self._control, self._process
        if control is None or process is None:
            raise RuntimeError("reward workers: their nursery is not running")
        line = b""
        try:
            control.settimeout(timeout)
            text = json.dumps(order).encode() + b"\n"
            sent = socket.send_fds(control, [text], [handing.fileno()] if handing else [])
            control.sendall(text[sent:])
            while not line.endswith(b"\n"):
                data = control.recv(65536)
                if not data:
                    raise RuntimeError(f"reward workers: their nursery ended with status {process.poll()}")
                line += data
        except OSError as error:
            raise RuntimeError(f"reward workers: their nursery does not answer: {error}") from error
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"reward workers: {reply['error']}")
        return reply


# ---------------------------------------------------------------------- in the child processes


def main() -> None:
    """Serves the parent until it is gone. The control socket is file descriptor argv[1]."""
    control = socket.socket(fileno=int(sys.argv[1]))
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    start, _ = _receive(control, parent)
    if start is None:
        return
    try:
        function = function_at(start["function"])
    except Exception as error:  # whatever an import raises; the parent reports it
        _reply(control, {"error": f"{start['function']} cannot be imported: {type(error).__name__}: {error}"})
        return
    try:
        for where, arguments in start["warm_up"]:
            function_at(where)(*arguments)
    except BaseException as error:  # as above; also SystemExit
        _reply(control, {"error": f"{type(error).__name__}: {error}"})
        return
    gc.collect()
    gc.freeze()  # the workers share these pages; a collection would touch, and so copy, all of them
    _reply(control, {"ready": True})
    while True:
        order, handed = _receive(control, parent)
        if order is None:
            return
        reply: dict[str, int | str]
        try:
            if "fork" in order:
                reply = {"pid": _fork(control, handed, function, start["memory_bytes"])}
            else:
                reply = {"status": os.waitpid(order["reap"], 0)[1]}
        except OSError as error:
            reply = {"error": f"{'fork' if 'fork' in order else 'waitpid'}: {error}"}
        _reply(control, reply)


def _fork(control: socket.socket, link: int, function: Callable[[Any], Any], memory_bytes: int) -> int:
    nursery = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            control.close()
            _work(socket.socket(fileno=link), function, memory_bytes, nursery)
        return pid
    finally:
        os.close(link)


def _receive(control: socket.socket, parent: int) -> tuple[dict | None, int]:
    """(order, file descriptor that came with it or -1); (None, -1) when the parent is gone."""
    line, handed = b"", -1
    while not line.endswith(b"\n"):
        while not select.select([control], [], [], _PARENT_CHECK_SECONDS)[0]:
            if os.getppid() != parent:  # a fork of the parent may hold the other end open
                return None, -1
        data, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            return None, -1
        line, handed = line + data, fds[0] if fds else handed
    return json.loads(line), handed


def _reply(control: socket.socket, message: dict) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


def _work(link: socket.socket, function: Callable[[Any], Any], memory_bytes: int, nursery: int) -> None:
    """A worker's life: one item after the other until the pool closes the link. Never returns."""
    status = 0
    try:
        if sys.platform == "linux":
            end_with_parent(signal.SIGKILL)
            if os.getppid() != nursery:  # it ended before it could be the cause of a signal
                os._exit(status)
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # ANTLR writes its complaints there
            os.dup2(nowhere, standard)
        while (item := _read_message(link)) is not None:
            link.sendall(_answer(function, item))
    except OSError:
        status = 1  # the pool is gone
    finally:
        os._exit(status)  # nothing of the nursery's must run in a worker


def _answer(function: Callable[[Any], Any], item: bytes) -> bytes:
    try:
        text = json.dumps({"value": function(json.loads(item))}).encode()
    except MemoryError:
        os._exit(MEMORY_STATUS)  # what is left of this process is not to be trusted
    except BaseException as error:  # also SystemExit and what libraries derive from BaseException
        text = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}).encode()
    return HEADER.pack(len(text)) + text


def _read_message(link: socket.socket) -> bytes | None:
    """The next message; None at the end of the link."""
    header = _read_exactly(link, HEADER.size)
    return _read_exactly(link, HEADER.unpack(header)[0]) if header else None


def _read_exactly(link: socket.socket, size: int) -> bytes | None:
    parts, missing = [], size
    while missing:
        part = link.recv(min(missing, 1 << 20))
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
