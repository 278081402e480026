"""One sandbox process tree, from its start to its end, and the packets exchanged with it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any

from r1engine.rewards.sandbox.protection import (
    INSIDE,
    INSIDE_BOUND,
    PYTHON,
    Protection,
    SandboxError,
    bwrap_command,
    package_paths,
    readable,
)

START_SECONDS = 120.0  # the modules that it imports may be large
GRACE_SECONDS = 5.0  # after a deadline that the sandbox itself should have kept
_STOP = b"stop"


class Slot:
    """A running sandbox. Not thread-safe; serves one program at a time."""

    def __init__(self, protection: Protection, modules: tuple[str, ...], number: int) -> None:
        """Starts it and waits until it is ready.

        Args:
            protection: the layers to use.
            modules: what is imported before programs are forked, besides much of the standard library.
            number: of this sandbox in this process; makes its user its own.

        Raises:
            SandboxError: it does not start, or a layer that was promised is not there.
        """
        self.is_dirty = False
        self._init: int | None = None  # pidfd of the sandbox's first process
        self._has_namespaces = protection.bwrap is not None
        self._folder = None if self._has_namespaces else tempfile.mkdtemp(prefix="r1engine-sandbox-")
        self._uid = _user(number) if protection.own_user else None
        if self._folder and self._uid is not None:
            os.chown(self._folder, self._uid, self._uid)
        scratch = self._folder or "/tmp"
        setup = {
            "uid": self._uid,
            "landlock": protection.landlock > 0,
            "seccomp": protection.has_seccomp,
            "namespaces": self._has_namespaces,
            "readable": [*readable(modules), INSIDE_BOUND if self._has_namespaces else str(INSIDE)],
            "scratch": scratch,
            "modules": list(modules),
            "paths": package_paths(modules),
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the slot
        self._start(protection.bwrap, modules, setup)
        try:
            hello = self._receive(START_SECONDS)
        except SandboxError:
            self._find_init()
            self.close()
            raise
        self._find_init()
        if (self._uid is not None and hello["uid"] != self._uid) or (self._has_namespaces and hello["pid"] != 1):
            self.close()
            raise SandboxError(f"sandbox: found {hello}, required user {self._uid} and process 1")

    def begin(self, order: dict[str, Any], descriptors: list[int]) -> None:
        """Sends a program; `finish` gets its result."""
        try:
            socket.send_fds(self._link, [json.dumps(order).encode()], descriptors)
        except OSError as error:
            raise SandboxError(f"sandbox: it is gone ({error})") from None

    def finish(self, seconds: float, *, stop: bool = False) -> dict[str, Any]:
        """Waits for the result; with `stop` the program is killed first.

        Raises:
            SandboxError: no result within `seconds` and a grace period.
        """
        with contextlib.suppress(OSError):
            if stop:
                self._link.send(_STOP)
        result = self._receive(seconds + GRACE_SECONDS)
        self.is_dirty = self.is_dirty or result["dirty"]
        return result

    def close(self) -> None:
        """Kills everything in it and removes its folder."""
        self._link.close()
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            os.close(self._init)
            self._init = None
        else:
            self._process.kill()
        self._process.wait()
        self._errors.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, bwrap: str | None, modules: tuple[str, ...], setup: dict[str, Any]) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A file, not a pipe: bubblewrap dies of a pipe that nobody reads, and leaves its child waiting for it.
        self._info = os.memfd_create("info")
        inside = INSIDE_BOUND if bwrap else str(INSIDE)
        command = bwrap_command(bwrap, modules=modules, info=self._info) if bwrap else []
        command += [PYTHON, "-I", "-S", "-B", f"{inside}/zygote.py", json.dumps(setup)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env={},
                    cwd="/",
                    pass_fds=[self._info],
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"sandbox: it cannot be started: {error}") from None

    def _find_init(self) -> None:
        """Gets hold of process 1 of the namespace, which is written down before it says hello."""
        with contextlib.suppress(ValueError, ProcessLookupError):
            self._init = os.pidfd_open(json.loads(os.pread(self._info, 10_000, 0))["child-pid"])
        os.close(self._info)

    def _receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        self._link.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            packet = self._link.recv(2**16)
        except OSError as error:
            raise SandboxError(f"sandbox: no answer within {seconds:.0f} s ({error})") from None
        if not packet:
            self._errors.seek(0)
            lines = self._errors.read(10_000).decode(errors="replace").strip().splitlines()
            raise SandboxError(f"sandbox: it ended: {lines[-1] if lines else 'without a word'}")
        return json.loads(packet)


def _user(number: int) -> int:
    """A user id that nobody has: by process and sandbox, inside the range that this user namespace maps.

    Raises:
        SandboxError: the range is too small.
    """
    with open("/proc/self/uid_map") as file:
        first, _, count = map(int, file.read().split()[:3])
    if first == 0 and count > 0x7400_0000:
        return 0x7000_0000 + os.getpid() * 16 + number % 16
    if first == 0 and count >= 60_000:
        return 20_000 + (os.getpid() * 16 + number) % 30_000
    raise SandboxError(f"sandbox: root may use {count} user ids from {first} on, required 60000 from 0 on")
