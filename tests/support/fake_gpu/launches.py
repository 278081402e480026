"""What would have been launched: every launch of a kernel is noted, and its arguments are held against the kernel's."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from fake_gpu.edge import DEVICE
from r1kernels import cuda_lib

ROOT = Path(__file__).resolve().parents[3]
C_TYPES = {
    "float": (torch.float32,),
    "__nv_bfloat16": (torch.bfloat16,),
    "uint8_t": (torch.uint8, torch.bool, torch.float8_e4m3fn),
    "int": (torch.int32,),
    "int64_t": (torch.int64,),
}
TRITON_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}
MOST_BLOCKS = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """One launch."""

    name: str
    kind: str  # cuda, triton or deep_gemm
    arguments: dict[str, Any]  # name -> "*bf16" and the like of a tensor, else the value
    grid: tuple[int, ...] = ()


class Launches(list[Launch]):
    """All of them, in order."""

    def counts(self) -> dict[str, int]:
        """Name -> how often."""
        return {name: sum(launch.name == name for launch in self) for name in dict.fromkeys(x.name for x in self)}


def record() -> Launches:
    """From here on kernels are noted and not run, in this process and for good."""
    found = Launches()
    cuda_lib.available = lambda: True

    def launch(name: str, *args: Any) -> None:
        found.append(Launch(name, "cuda", _checked_c(name, args)))

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_checked_triton(self, args, grid, options))

    cuda_lib.launch = launch
    JITFunction.run = run
    sys.modules["deep_gemm"] = _deep_gemm(found)
    return found


def _on_device(name: str, argument: str, tensor: torch.Tensor) -> None:
    assert tensor.device == DEVICE, f"{name}: {argument} is on {tensor.device}"


# ------------------------------------------------------------------ csrc/


@cache
def c_signatures() -> dict[str, list[tuple[str, str, bool]]]:
    """Exported function -> (name, type, is a pointer) of each argument but the stream, from the sources."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.cu")))
    found = {}
    for name, arguments in re.findall(r"R1_EXPORT int (\w+)\(([^)]*)\)", sources):
        parts = [re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)", " ".join(x.split())) for x in arguments.split(",")]
        found[name] = [(p[3], p[1], bool(p[2])) for p in parts if p is not None and p[1] != "cudaStream_t"]
    return found


def _checked_c(name: str, args: tuple) -> dict[str, Any]:
    signature, seen = c_signatures()[name], {}
    assert len(args) == len(signature), f"{name} takes {len(signature)} arguments, found {len(args)}"
    for value, (argument, kind, is_pointer) in zip(args, signature, strict=True):
        if not is_pointer:
            wanted = float if kind == "float" else int
            assert type(value) is wanted, f"{name}: {argument} is {value!r}, required is {wanted.__name__}"
        elif value is not None:
            _on_device(name, argument, value)
            assert value.dtype in C_TYPES[kind], f"{name}: {argument} is {value.dtype}, required is {kind}"
            assert value.is_contiguous(), f"{name}: {argument} has strides {value.stride()}"
            begins = value.storage_offset() * value.element_size() % cuda_lib.VECTOR_BYTES
            assert not (begins and value.dim() >= 2), f"{name}: {argument} begins {begins} bytes off"
        seen[argument] = TRITON_TYPES.get(value.dtype, str(value.dtype)) if isinstance(value, torch.Tensor) else value
    return seen


# ------------------------------------------------------------------ Triton


def _checked_triton(kernel: JITFunction, args: tuple, grid: Any, options: dict[str, Any]) -> Launch:
    name = kernel.fn.__name__
    given = {key: value for key, value in options.items() if key in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*args, **given)  # raises for one that is missing or unknown
    bound.apply_defaults()
    values = bound.arguments
    grid = grid(values) if callable(grid) else grid
    for size, most in zip(grid, MOST_BLOCKS, strict=False):
        assert isinstance(size, int) and 1 <= size <= most, f"{name}: a grid of {grid}"
    seen = {}
    for argument, value in values.items():
        if isinstance(value, torch.Tensor):
            _on_device(name, argument, value)
            seen[argument] = TRITON_TYPES[value.dtype]
        else:
            assert not isinstance(value, int) or -(2**63) <= value < 2**63, f"{name}: {argument} is {value}"
            seen[argument] = value
    return Launch(name, "triton", seen, tuple(grid))


# ------------------------------------------------------------------ DeepGEMM


def _deep_gemm(found: Launches) -> ModuleType:
    """A stand-in with DeepGEMM's rules about its arguments."""
    module = ModuleType("deep_gemm")
    module.__spec__ = ModuleSpec("deep_gemm", None)

    def check(name: str, *tensors: tuple[torch.Tensor, torch.dtype]) -> None:
        for tensor, dtype in tensors:
            _on_device(name, str(tuple(tensor.shape)), tensor)
            assert tensor.dtype == dtype, f"{name}: found {tensor.dtype} {tuple(tensor.shape)}, required {dtype}"
        found.append(Launch(name, "deep_gemm", {}))

    def gemm(rows: tuple, weight: tuple, out: torch.Tensor, expert_of: torch.Tensor) -> None:
        fp8, scales = torch.float8_e4m3fn, torch.float32
        given = [(rows[0], fp8), (rows[1], scales), (weight[0], fp8), (weight[1], scales)]
        check("m_grouped_fp8_gemm_nt_contiguous", *given, (out, torch.bfloat16), (expert_of, torch.int32))
        (num_rows, k), (experts, n, _) = rows[0].shape, weight[0].shape
        assert weight[0].is_contiguous() and rows[0].is_contiguous() and out.shape == (num_rows, n)
        assert rows[1].shape == (num_rows, k // 128) and weight[1].shape == (experts, n // 128, k // 128)

    def wgrad(grad: tuple, rows: tuple, out: torch.Tensor, sizes: list[int], on_device: Any, added: Any) -> None:
        check("k_grouped_fp8_gemm_nt_contiguous", (out, torch.float32), (on_device, torch.int32))
        assert added is out and len(sizes) == len(out)

    module.m_grouped_fp8_gemm_nt_contiguous = gemm
    module.k_grouped_fp8_gemm_nt_contiguous = wgrad
    return module
