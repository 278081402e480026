"""Execute csrc/ on a CPU: the same .cu files, compiled by g++ against the CUDA subset in tests/csrc.

with cuda_on_cpu.use(cuda_on_cpu.build(folder)):
    values, scale = cuda_impl.quantize(x, (1, 128))  # launches on CPU tensors
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from r1kernels import cuda_lib

ROOT = Path(__file__).resolve().parents[2]
# No fused multiply-add: a float32 product is rounded before it is added, as PyTorch does it.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", '-DR1_CUDA_ARCHITECTURES="cpu"']
# The stacks are the fibers' own, which the sanitizer does not know: it checks tensors and shared memory.
SANITIZE = ["-g", "-fsanitize=address,alignment", "-fno-sanitize-recover=all", "--param=asan-stack=0"]
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


def build(folder: Path, *options: str) -> Path:
    """Compile csrc/ into one library.

    Raises:
        RuntimeError: it does not compile; with the compiler's message.
    """
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.cu")):
        objects.append(folder / f"{source.stem}.o")
        include = ["-I", ROOT / "tests" / "csrc", "-I", ROOT / "csrc"]
        _run("g++", *FLAGS, *options, *include, "-x", "c++", "-c", source, "-o", objects[-1])
    library = folder / "cuda_on_cpu.so"
    _run("g++", "-shared", *options, *objects, "-o", library)
    return library


def has_compiler() -> bool:
    return shutil.which("g++") is not None


@contextlib.contextmanager
def use(path: Path, order: str = "forward") -> Iterator[None]:
    """cuda_lib calls this library inside; blocks and threads run in `order`."""
    found, cuda_lib.library_path = cuda_lib.library_path, lambda: str(path)
    cuda_lib.library.cache_clear()
    try:
        cuda_lib.library().cuda_on_cpu_order(ctypes.c_int(ORDERS[order]))
        yield
    finally:
        cuda_lib.library_path = found
        cuda_lib.library.cache_clear()


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuda_on_cpu: {done.stderr[-4000:]}")
