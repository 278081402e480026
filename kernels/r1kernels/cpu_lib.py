"""The compiled CPU library (csrc/cpu/): finds it, checks its interface version, calls its functions.

It has a plain C interface, so one build serves every Python and torch version, and runs on the threads of PyTorch's own
OpenMP runtime. Where it is missing its callers compute the same with PyTorch. Importing this module loads nothing.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import re
from functools import cache
from pathlib import Path

import torch

ABI_VERSION = 4  # R1_CPU_ABI_VERSION of csrc/cpu/export.h
FILE_NAME = "_cpu.so"


def library_path() -> str | None:
    """Path of the compiled library, or None when this installation has none."""
    file = importlib.resources.files("r1kernels").joinpath(FILE_NAME)
    return str(file) if file.is_file() else None


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the library is there and can read these tensors: float32, on the CPU, contiguous."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors) and (
        _library() is not None
    )


def state() -> str:
    """What a user is told: the library's path, or why there is none."""
    if library_path() is None:
        return "not built (needs a C++ compiler: GCC 12 or Clang); PyTorch computes instead"
    if _library() is None:
        return "needs AVX2 (x86) and PyTorch's OpenMP runtime, one of them is missing; PyTorch computes instead"
    return f"{library_path()}"


def call(name: str, *args: torch.Tensor | int | float | None) -> None:
    """Calls the function `name` on torch.get_num_threads() threads.

    Args:
        name: exported function, such as "r1_cpu_swiglu".
        args: in the order of the C signature; a tensor passes its data pointer, None a null pointer, an int is int64_t,
              a float is float.
    """
    found = _library()
    assert found is not None, "ask `takes` first"
    lib, run_team = found
    function = getattr(lib, name)
    if function.argtypes is None:  # the kinds of its arguments are the same in every call
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, *(_c_type(arg) for arg in args)]
        function.restype = None
    values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    function(run_team, torch.get_num_threads(), *values)


def _c_type(arg: torch.Tensor | int | float | None) -> type:
    if isinstance(arg, int):
        return ctypes.c_int64
    return ctypes.c_float if isinstance(arg, float) else ctypes.c_void_p


@cache
def _library() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """The loaded library and the function that runs PyTorch's thread team; None where it cannot run.

    Raises:
        RuntimeError: the library cannot be loaded or has another interface version.
    """
    path, run_team = library_path(), _run_team()
    if path is None or run_team is None:
        return None
    try:
        lib = ctypes.CDLL(path)
    except OSError as error:
        raise RuntimeError(f"r1kernels: {path} cannot be loaded: {error}") from error
    found = lib.r1_cpu_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(
            f"r1kernels: {path} has interface version {found}, {ABI_VERSION} is required; run `pip install .` again"
        )
    return (lib, run_team) if lib.r1_cpu_is_supported() else None


def _run_team() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that PyTorch has loaded (libgomp, libomp and libiomp5 all have it)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = [line.split()[-1] for line in maps.read_text().splitlines()]
    runtimes = {path for path in loaded if re.fullmatch(r"lib(gomp|omp|iomp5).*\.so[.\d]*", Path(path).name)}
    for path in sorted(runtimes, key=lambda path: ("/torch" not in path, path)):  # other packages may bring their own
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p)
    return None
