"""What a forked child of the zygote does: the modes in which a program can run.

    script     as __main__, from standard input to standard output
    functions  answers calls of its functions over a channel
    check      code that asserts something of a function that runs elsewhere; each call goes over the channel
    binary     an executable
    compile    C++ from standard input to the file `program` in the scratch folder

The channel is a stream of frames: 4 bytes of length, then JSON.
"""

from __future__ import annotations

import atexit
import json
import os
import site
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import IO, Any

import plain

FRAME_BYTES = 2**20
CPP_OPTIONS = ["-x", "c++", "-O2", "-std=c++17", "-pipe", "-o", "program", "-"]


def run(mode: str, argument: str, scratch: str, *, program: int, channel: int) -> int:
    """Runs in the child, with everything given up; exit status. `argument` is the path of the compiler."""
    os.chdir(scratch)
    if mode == "compile":
        os.execve(argument, [argument, *CPP_OPTIONS], {"PATH": "/usr/bin:/bin", "TMPDIR": scratch})
    if mode == "binary":
        os.close(channel)
        os.execve(program, ["program"], {})
    with open(program, "rb") as file:
        parts = file.read().split(b"\0")  # a prelude and the program
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _text(number, "r" if number == 0 else "w")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["program.py"]
    for define in (site.setquit, site.setcopyright, site.sethelper):  # exit, quit, help, ...: the interpreter has -S
        define()
    sys.set_int_max_str_digits(0)  # a contest's answer may be longer; the time limit holds
    try:
        if mode == "script":
            os.close(channel)
            status = _guarded(lambda: _execute(parts, _module("__main__")))
        else:
            link = _Channel(channel)
            serve = {"functions": _serve_functions, "check": _check}[mode]
            status = _guarded(lambda: serve(parts, link))
    finally:
        # What the interpreter does at its end; programs join threads and print from atexit.
        threading._shutdown()  # type: ignore[attr-defined]  # private
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return status


class _Channel:
    def __init__(self, number: int) -> None:
        self.number = number

    def send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        if len(text) > FRAME_BYTES:
            raise ValueError(f"a value of more than {FRAME_BYTES} bytes")
        view = memoryview(len(text).to_bytes(4, "big") + text)
        while view:
            view = view[os.write(self.number, view) :]

    def receive(self) -> dict[str, Any]:
        return json.loads(self._read(int.from_bytes(self._read(4), "big")))

    def _read(self, size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = os.read(self.number, size - len(parts))
            if not part:
                os._exit(0)  # nobody asks any more
            parts += part
        return parts


def _serve_functions(parts: list[bytes], link: _Channel) -> None:
    module = _module("program")
    try:
        _execute(parts, module)
    except BaseException as error:
        link.send({"failed": _one_line(error)})
        return
    link.send({"ready": True})
    while True:
        asked = link.receive()
        try:
            arguments = [plain.decode(argument) for argument in asked["arguments"]]
            answer = {"value": plain.encode(_find(module, asked["name"])(*arguments))}
            link.send(answer)
        except BaseException as error:
            link.send({"raised": type(error).__name__, "message": _one_line(error)})


def _find(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """A function of the program, or a method of its class Solution."""
    if hasattr(module, name):
        return getattr(module, name)
    if hasattr(module, "Solution"):
        return getattr(module.Solution(), name)
    raise NameError(f"the program defines no {name}")


def _check(parts: list[bytes], link: _Channel) -> None:
    def candidate(*arguments: Any) -> Any:
        link.send({"arguments": [plain.encode(argument) for argument in arguments]})
        answer = link.receive()
        if "value" in answer:
            return plain.decode(answer["value"])
        builtin = getattr(__import__("builtins"), str(answer.get("raised")), None)
        error = builtin if isinstance(builtin, type) and issubclass(builtin, Exception) else RuntimeError
        raise error(answer.get("message"))

    module = _module("__main__")
    try:
        _execute(parts, module)
        module.check(candidate)
    except BaseException as error:
        link.send({"failed": _one_line(error)})
    else:
        link.send({"passed": True})


def _guarded(function: Callable[[], object]) -> int:
    """Exit status, as the interpreter would give it."""
    try:
        function()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc(limit=-8)
        return 1
    return 0


def _execute(parts: list[bytes], module: types.ModuleType) -> None:
    for part in parts:
        exec(compile(part, "program.py", "exec"), module.__dict__)


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _text(number: int, mode: str) -> IO[str]:
    errors = "backslashreplace" if number == 2 else "surrogateescape"
    return open(number, mode, encoding="utf-8", errors=errors, closefd=False)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
