"""Runs programs in a sandbox, one at a time: scripts, functions, compiled programs."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from r1engine.rewards.sandbox.protection import Protection, SandboxError, compiler, probe
from r1engine.rewards.sandbox.slot import Slot

FRAME_BYTES = 2**20
_numbers = itertools.count()
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Limits:
    """What a program may use. Time is processor time, so that a busy machine fails nobody."""

    cpu_seconds: int = 6  # as LiveCodeBench
    memory_bytes: int = 2**30  # address space; a quarter of it for the stack
    output_bytes: int = 8 * 2**20  # of standard output, of standard error, and of any file
    processes: int = 64  # threads too; where the sandbox has a user or a namespace of its own
    may_fork: bool = False
    wall_seconds: float = 13.0  # when a program that sleeps or waits is killed; one that computes: longest_seconds

    @property
    def longest_seconds(self) -> float:
        """When any program is killed."""
        return 4.0 * self.wall_seconds


@dataclass(frozen=True)
class ProgramRun:
    """What became of a program."""

    problem: str  # "" for exit status 0, else one line: time, output, signal, or exit status with the error
    stdout: bytes
    stderr: str
    cpu_seconds: float
    wall_seconds: float


DEFAULT_LIMITS = Limits()


class ProgramError(Exception):
    """The program failed; the message says how, in one line."""


class Gone(Exception):
    """The other end of a channel has ended or is out of time."""

    def __init__(self, channel: Channel) -> None:
        super().__init__("the program has ended or is out of time")
        self.channel = channel


class Sandbox:
    """A place to run programs that nobody trusts, one at a time; usable from any thread.

    Every program is a fresh fork of a warm interpreter without privileges, secrets, network or files of its own.
    It starts with its first program, and is replaced when a program leaves a file or breaks it.
    """

    def __init__(
        self, *, unsafe: bool = False, modules: tuple[str, ...] = (), protection: Protection | None = None
    ) -> None:
        """
        Args:
            unsafe: run programs even where too little protects the machine from them.
            modules: imported before the fork, so that programs get them for nothing.
            protection: the layers to use; None: all that are there.

        Raises:
            RuntimeError: too little protects and `unsafe` is not set.
        """
        self.protection = protection or probe()
        self.protection.require(unsafe=unsafe)
        self._modules = modules
        self._number = next(_numbers)
        self._slot: Slot | None = None
        self._lock = threading.RLock()

    def close(self) -> None:
        """Ends it; a later program starts it again."""
        with self._lock:
            if self._slot is not None:
                self._slot.close()
                self._slot = None
            if "beside" in vars(self):
                self.beside.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def beside(self) -> Sandbox:
        """A second sandbox like this one, for programs that must not share a place with this one's."""
        return Sandbox(unsafe=True, modules=self._modules, protection=self.protection)  # it was checked here

    def run_script(
        self, source: str, stdin: str | bytes = b"", limits: Limits = DEFAULT_LIMITS, *, prelude: str = ""
    ) -> ProgramRun:
        """Runs a Python program as __main__, after `prelude`, whose names it sees.

        Raises:
            SandboxError: the sandbox failed, twice.
        """
        with contextlib.ExitStack() as stack:
            return self._run("script", "", stdin, _memory(stack, _source(prelude, source)), limits)

    def run_binary(self, program: int, stdin: str | bytes = b"", limits: Limits = DEFAULT_LIMITS) -> ProgramRun:
        """Runs what `compile_cpp` made.

        Raises:
            SandboxError: as for `run_script`.
        """
        return self._run("binary", "", stdin, program, limits)

    @contextlib.contextmanager
    def compile_cpp(self, source: str, *, cpu_seconds: int = 30) -> Iterator[int]:
        """The descriptor of the compiled program, open inside the block.

        Raises:
            ProgramError: it does not compile.
            SandboxError: there is no compiler, or the sandbox failed.
        """
        path = compiler()
        if path is None:
            raise SandboxError("sandbox: no C++ compiler; required g++ or clang++ in /usr/bin")
        limits = Limits(cpu_seconds=cpu_seconds, memory_bytes=2**31, output_bytes=2**25, may_fork=True)
        with contextlib.ExitStack() as stack:
            out = _memory(stack, b"")
            run = self._run("compile", path, source, _memory(stack, b""), limits, [out])
            if run.problem:
                lines = [line for line in run.stderr.splitlines() if "error" in line] or [run.problem]
                raise ProgramError(f"it does not compile: {lines[0][:200]}")
            fcntl.fcntl(out, fcntl.F_ADD_SEALS, _SEALS)  # no run can change it for the next
            yield out

    @contextlib.contextmanager
    def functions(
        self,
        source: str,
        limits: Limits = DEFAULT_LIMITS,
        *,
        prelude: str = "",
        mode: Literal["functions", "check"] = "functions",
    ) -> Iterator[Channel]:
        """A running Python module whose functions can be called; the limits are those of all calls together.

        With mode "check" it is the module that calls: check(candidate), each call of `candidate` being a frame
        {"arguments"} that wants {"value"} or {"raised", "message"}; its last frame is {"passed"} or {"failed"}.

        Raises:
            ProgramError: it fails before it can be called.
            SandboxError: the sandbox failed.
        """
        with self._lock, contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            files = [_memory(stack, b"") for _ in range(3)]
            program = _memory(stack, _source(prelude, source))
            with theirs:
                self._begin(_order(mode, "", limits), [*files, program, theirs.fileno()])
            channel = Channel(ours, time.monotonic() + limits.longest_seconds)
            try:
                if mode == "functions" and (failed := channel.receive().get("failed")):
                    raise ProgramError(str(failed))
                yield channel
            except Gone as gone:
                if gone.channel is not channel:
                    raise
                problem = _problem(self._end(limits, stop=True), limits, 0, _text(files[2]))
                raise ProgramError(problem or "it ended early") from None
            finally:
                if self._is_busy:
                    self._end(limits, stop=True)

    _is_busy = False

    def _run(
        self, mode: str, argument: str, stdin: str | bytes, program: int, limits: Limits, more: list[int] | None = None
    ) -> ProgramRun:
        with self._lock, contextlib.ExitStack() as stack:
            source, out, err = _memory(stack, _bytes(stdin)), _memory(stack, b""), _memory(stack, b"")
            empty = _memory(stack, b"")
            descriptors = [source, out, err, program, empty, *(more or [])]
            for attempt in (1, 2):
                try:
                    self._begin(_order(mode, argument, limits), descriptors)
                    result = self._end(limits)
                    break
                except SandboxError:
                    if attempt == 2:
                        raise
                    for number in (source, out, err):
                        os.lseek(number, 0, os.SEEK_SET)
                    for number in (out, err):
                        os.ftruncate(number, 0)
            size = max(os.fstat(out).st_size, os.fstat(err).st_size)
            stderr = _text(err)
            problem = _problem(result, limits, size, stderr)
            stdout = os.pread(out, limits.output_bytes, 0)
            return ProgramRun(problem, stdout, stderr, result["cpu"], result["wall"])

    def _begin(self, order: dict[str, Any], descriptors: list[int]) -> None:
        if self._slot is None:
            self._slot = Slot(self.protection, self._modules, self._number)
        try:
            self._slot.begin(order, descriptors)
        except SandboxError:
            self.close()
            raise
        self._is_busy = True

    def _end(self, limits: Limits, *, stop: bool = False) -> dict[str, Any]:
        self._is_busy, slot = False, self._slot
        assert slot is not None  # as it has begun
        try:
            result = slot.finish(limits.longest_seconds, stop=stop)
        except SandboxError:
            self.close()
            raise
        if slot.is_dirty:
            self.close()
        return result


class Channel:
    """Frames to and from a program, until a deadline; the other side may send anything."""

    def __init__(self, link: socket.socket, deadline: float) -> None:
        self._link, self._deadline = link, deadline

    def call(self, name: str, arguments: list[Any]) -> Any:
        """What a function returns; arguments and value are in the form of `inside.plain.encode`.

        Raises:
            ProgramError: it raised, or returned something that is no plain value.
            Gone: it did not return.
        """
        answer = self.ask({"name": name, "arguments": arguments})
        if "value" not in answer:
            raise ProgramError(str(answer.get("message", "it answered nonsense"))[:200])
        return answer["value"]

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a frame and gets the next one."""
        self.send(message)
        return self.receive()

    def send(self, message: dict[str, Any]) -> None:
        """Sends one frame."""
        text = json.dumps(message).encode()
        self._set_timeout()
        try:
            self._link.sendall(len(text).to_bytes(4, "big") + text)
        except OSError:
            raise Gone(self) from None

    def receive(self) -> dict[str, Any]:
        """The next frame."""
        size = int.from_bytes(self._read(4), "big")
        if size > FRAME_BYTES:
            raise ProgramError(f"it answered with more than {FRAME_BYTES} bytes")
        try:
            message = json.loads(self._read(size))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ProgramError("it answered nonsense")
        return message

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._set_timeout()
            try:
                part = self._link.recv(size - len(parts))
            except OSError:
                part = b""
            if not part:
                raise Gone(self)
            parts += part
        return bytes(parts)

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Gone(self)
        self._link.settimeout(left)


def _problem(result: dict[str, Any], limits: Limits, size: int, stderr: str) -> str:
    """Why a run is no success, in one line, or ""."""
    code = os.waitstatus_to_exitcode(result["status"])
    if result["late"]:
        return f"time limit: still running after {result['wall']:.0f} s"
    if -code == signal.SIGXCPU or result["cpu"] > limits.cpu_seconds:
        return f"time limit: {result['cpu']:.1f} s of {limits.cpu_seconds} s processor time"
    if size >= limits.output_bytes:
        return f"output limit: {limits.output_bytes} bytes"
    if code < 0:
        return f"killed by {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"
    if code:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        return f"exit status {code}: {last[:200]}"
    return ""


def _order(mode: str, argument: str, limits: Limits) -> dict[str, Any]:
    return {"mode": mode, "argument": argument, "limits": vars(limits) | {"wall_seconds": limits.wall_seconds}}


def _memory(stack: contextlib.ExitStack, content: bytes) -> int:
    """A file in memory with this content, at its start; closed with the stack."""
    number = os.memfd_create("r1engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, number)
    view = memoryview(content)
    while view:
        view = view[os.write(number, view) :]
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _source(prelude: str, source: str) -> bytes:
    """Both, to be compiled apart: a program may start with `from __future__ import ...`."""
    return _bytes(prelude) + b"\0" + _bytes(source)


def _bytes(text: str | bytes) -> bytes:
    # A model can write half a surrogate pair, which is no character; the program gets bytes that are no UTF-8.
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def _text(number: int) -> str:
    size = os.fstat(number).st_size
    return os.pread(number, 4000, max(0, size - 4000)).decode("utf-8", "replace")
