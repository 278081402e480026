"""The compiled CUDA library (csrc/): finds it, checks its interface version, calls its launchers.

It has a plain C interface (csrc/export.h), so one build serves every Python and torch version; shapes and
dtypes are checked in Python before the call. Importing this module loads nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.resources
from functools import cache

import torch

VECTOR_BYTES = 16  # what a thread of the kernels reads at once
ABI_VERSION = 1  # R1_ABI_VERSION of csrc/export.h
FILE_NAME = "_cuda.so"


def library_path() -> str | None:
    """Path of the compiled library, or None when this installation has none.

    An editable install keeps the library in its own folder, away from the .py files; importlib.resources sees both.
    """
    file = importlib.resources.files("r1kernels").joinpath(FILE_NAME)
    return str(file) if file.is_file() else None


def available() -> bool:
    """True when the library is installed. Says nothing about a GPU; `library` checks the version."""
    return library_path() is not None


@cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it was not built, cannot be loaded, or has another interface version.
    """
    path = library_path()
    if path is None:
        raise RuntimeError(
            f"r1kernels: {FILE_NAME} is not installed; it is built by `pip install .` where nvcc is on PATH "
            "(the reference implementations need no library)"
        )
    try:
        lib = ctypes.CDLL(path)
    except OSError as error:
        raise RuntimeError(f"r1kernels: {path} cannot be loaded: {error}") from error
    lib.r1_build_info.restype = ctypes.c_char_p
    lib.r1_error_string.restype = ctypes.c_char_p
    found = lib.r1_abi_version()
    if found != ABI_VERSION:
        raise RuntimeError(
            f"r1kernels: {path} has interface version {found}, {ABI_VERSION} is required; run `pip install .` again"
        )
    return lib


def build_info() -> str:
    """CUDA version, architectures and host compiler of the library. Raises RuntimeError as `library` does."""
    return library().r1_build_info().decode()


def launch(name: str, *args: torch.Tensor | int | float | None) -> None:
    """Calls the launcher `name` on the device of the first tensor, on PyTorch's current stream there.

    Args:
        name: exported function, such as "r1_fp8_quantize_bf16".
        args: in the order of the C signature; a tensor passes its data pointer, None a null pointer, an int is int64_t,
              a float is float.

    Raises:
        ValueError: the rows of a tensor do not begin where 16 bytes can be read at once, as in a view at an odd offset.
        RuntimeError: the library is missing or has no such function, or the launch failed.
    """
    lib = library()
    if not hasattr(lib, name):
        raise RuntimeError(f"r1kernels: the library has no function {name}; run `pip install .` again")
    for arg in args:
        if isinstance(arg, torch.Tensor):
            check_vectors(name, arg)
    device = next((arg.device for arg in args if isinstance(arg, torch.Tensor)), torch.device("cpu"))
    is_cuda = device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if is_cuda else None
        error = getattr(lib, name)(*(_c_value(arg) for arg in args), ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}: {lib.r1_error_string(error).decode()}")


def check_vectors(name: str, tensor: torch.Tensor) -> None:
    """Require that rows of whole vectors begin where vectors can be read.

    Raises:
        ValueError: they do not.
    """
    if tensor.dim() < 2 or not tensor.is_floating_point() or tensor.shape[-1] * tensor.element_size() % VECTOR_BYTES:
        return  # indices, and rows of another length, are read one by one
    if over := tensor.data_ptr() % VECTOR_BYTES:
        raise ValueError(
            f"{name}: a tensor of {tuple(tensor.shape)} begins {over} bytes past a multiple of {VECTOR_BYTES}, "
            "required is a multiple: pass a clone"
        )


def _c_value(arg: torch.Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, torch.Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_int64(arg) if isinstance(arg, int) else ctypes.c_float(arg)
