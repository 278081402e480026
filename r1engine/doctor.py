"""What `r1engine doctor` prints: what this machine has and what the engine would use of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "transformers", "sglang")
GB = 1e9


def print_table() -> None:
    """Prints one table of what was found."""
    table = Table(title="r1engine doctor", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts():
        table.add_row(name, escape(value))
    Console().print(table)


def facts() -> list[tuple[str, str]]:
    """(what, what was found), in the order of the table."""
    rows = [("r1engine", _version("r1engine")), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows += [("GPUs", _devices()), ("CPU cores", str(len(os.sched_getaffinity(0)))), ("memory", _memory())]
    disk = shutil.disk_usage(os.getcwd())
    rows += [("free disk here", f"{disk.free / GB:.1f} of {disk.total / GB:.1f} GB")]
    rows += [
        ("compiled CPU functions", _cpu_library()),
        ("compiled CUDA kernels", _cuda_library()),
        ("attention on a GPU", _attention()),
        ("model.fp8", _fp8()),
        ("sandbox", _sandbox()),
    ]
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    if not torch.cuda.is_available():
        return "none"
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "\n".join(f"{p.name}, {p.total_memory / GB:.1f} GB, sm_{p.major}{p.minor}" for p in properties)


def _attention() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    from r1engine.model.layers import flash

    try:
        return flash.choice()
    except RuntimeError as error:
        return str(error)


def _fp8() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    from r1engine.model.layers.fp8 import machine_problem

    return machine_problem() or "can run"


def _sandbox() -> str:
    from r1engine.rewards.sandbox import compiler, probe

    problem = probe().problem()
    verdict = f"code rewards are refused: {problem}" if problem else "code rewards can run"
    return "\n".join([verdict, *probe().describe(), f"C++ compiler: {compiler() or 'none'}"])


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB available"


def _cpu_library() -> str:
    if importlib.util.find_spec("r1kernels") is None or importlib.util.find_spec("torch") is None:
        return "unknown without torch and r1kernels"
    from r1kernels import cpu_lib

    return cpu_lib.state()


def _cuda_library() -> str:
    if importlib.util.find_spec("r1kernels") is None or importlib.util.find_spec("torch") is None:
        return "unknown without torch and r1kernels"
    from r1kernels.cuda_lib import library_path

    return library_path() or "not built (needs nvcc at install); ops use Triton or plain PyTorch"
