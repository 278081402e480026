"""Runs a function or a script as one or several ranks: forks of a process that has imported the engine; or torchrun."""

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

SECONDS = 900  # for a machine that others use too
_forks = multiprocessing.get_context("forkserver")
# Seconds of imports: PyTorch, Megatron, transformers; what PyTorch's and Megatron's calls import; the report's.
_forks.set_forkserver_preload(["r1engine.run", "torch._dynamo", "jinja2", "plotly.offline", "pytest"])


def torchrun(ranks: int, script: Path, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run the script under torchrun with one thread a rank; its output is captured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts)]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def forked(ranks: int, script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The same without the imports: every rank is a fork of a process of this session that has done them.

    A single one starts as `r1engine train` does, without a launcher. The status is that of the first rank that failed;
    the others are then stopped, as torchrun does.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        argv = [str(script), *map(str, arguments)]
        status = _status([{}] if ranks == 1 else _environments(ranks), _run_script, (argv, out, err), _forks)
        return subprocess.CompletedProcess(argv, status, out.read_text(), err.read_text())


def on_ranks(ranks: int, function: Callable, *arguments: object, context: BaseContext = _forks) -> list:
    """What function(*arguments) returns on each rank; with the context "fork" the ranks are forks of the caller.

    Raises:
        RuntimeError: the function fails on a rank; with what the ranks wrote to stderr.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        err, environments = Path(folder, "err"), _environments(ranks)
        if _status(environments, _keep_result, (Path(folder), function, arguments), context):
            raise RuntimeError(f"{function.__name__} on {ranks} ranks: {err.read_text()[-4000:]}")
        return [pickle.loads(Path(folder, env["RANK"]).read_bytes()) for env in environments]


def _environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    return [meeting | sizes | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(ranks)]


def _start(env: dict[str, str], function: Callable[..., None], arguments: Sequence[object]) -> None:
    import torch

    os.environ.update(env)
    torch.set_num_threads(1)
    function(*arguments)


def _keep_result(folder: Path, function: Callable, arguments: Sequence[object]) -> None:
    _redirect(2, folder / "err")
    result = function(*arguments)
    Path(folder, os.environ["RANK"]).write_bytes(pickle.dumps(result))


def _run_script(argv: list[str], out: Path, err: Path) -> None:
    _redirect(1, out)
    _redirect(2, err)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _redirect(stream: int, file: Path) -> None:
    """From here on what this process writes to the stream is appended to the file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)


def _status(
    environments: list[dict[str, str]], function: Callable[..., None], arguments: Sequence[object], context: BaseContext
) -> int:
    """Of the first process that fails, 0 if none does."""
    if context is _forks:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)  # a rank is no test: it has the Triton that a user has
            forkserver.ensure_running()
    processes = [context.Process(target=_start, args=(env, function, arguments)) for env in environments]
    for process in processes:
        process.start()
    deadline, running = time.monotonic() + SECONDS, {process.sentinel: process for process in processes}
    status = 0
    while running and time.monotonic() < deadline:
        for sentinel in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
            ended = running.pop(sentinel)
            ended.join()
            if status == 0 and ended.exitcode:
                status, deadline = ended.exitcode, min(deadline, time.monotonic() + 5)
    for process in running.values():
        process.kill()
        process.join()
    if running and status == 0:
        raise TimeoutError(f"{len(running)} of {len(processes)} ranks still ran after {SECONDS} s")
    return status


@contextmanager
def beside(function: Callable, arguments: Sequence[tuple]) -> Iterator[list]:
    """Processes that run function(*arguments), one for each set of arguments, until the end; forks as in `forked`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        forkserver.ensure_running()
    processes = [_forks.Process(target=_start, args=({}, function, own)) for own in arguments]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
