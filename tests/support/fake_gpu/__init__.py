"""A GPU that does not exist: tensors on the device "cuda" are fake (shapes, dtypes, devices, no numbers), tensors of
the host are real. What the engine would do on a GPU runs on a CPU build of PyTorch, and is watched.

It shows devices, dtypes, shapes, the choice of implementations, the arguments of every launch and where the host waits.
It shows no numbers, no streams, no races. What comes from the device is zeros.

Nothing is put back: `start` is for a process of its own (ranks.on_ranks).
"""

from __future__ import annotations

import ctypes
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from fake_gpu import edge
from fake_gpu.launches import Launches, record

HERE = Path(__file__).parent
aten = torch.ops.aten
BY_VALUES = (aten.nonzero.default, aten.masked_select.default)


def build(folder: Path) -> Path:
    """Compile device.cpp for the PyTorch that is installed.

    Raises:
        RuntimeError: it does not compile; with the compiler's message.
    """
    library, package = folder / "fake_gpu.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{package / 'include'}", HERE / "device.cpp"]
    command += ["-o", library, f"-L{package / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fake_gpu: {done.stderr[-4000:]}")
    return library


class _Fakes(FakeTensorMode):
    avoid_device_init = True  # although CUDA is said to be available


class FakeGpu(TorchDispatchMode):
    """The mode under which the device is there.

    Attributes:
        waits: place in the engine -> how often the host waited for the device there.
        ops:   calls of operations on the device, views left out.
        made:  (operation, dtype, shape) of their results, those left out that are written in place -> how many.
        launches: of kernels, in order.
        recorded: CUDA graphs; while one is recorded nothing may wait, and nothing come from the host.
    """

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches
        self.waits: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.made: Counter[tuple[str, torch.dtype, tuple[int, ...]]] = Counter()
        self.recorded = 0
        self._is_recording = False
        self.fakes = _Fakes(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not _is_of_device(args, kwargs):
            return func(*args, **kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {}))
        # Autograd, which is off, would have done it.
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if not func.is_view:
            self.ops[str(func.overloadpacket.__name__)] += 1
        if func.namespace == "c10d":  # the backend "fake" does nothing, with host memory as with any other
            return func(*tree_map_only(FakeTensor, _zeros, args), **kwargs)
        if self._is_recording:
            reads = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
            assert not reads, f"{func} at {place()} reads host memory in a graph"
        if func is aten._local_scalar_dense.default:
            self._wait()
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):  # from the device into host memory
            if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self._wait()
            return args[0].zero_()
        if func in BY_VALUES:  # their sizes follow from values, which are zeros: nothing is chosen
            self._wait()
            is_index = func is aten.nonzero.default
            return args[0].new_empty((0, args[0].dim()) if is_index else 0, dtype=torch.int64 if is_index else None)
        with self.fakes:
            out = func(*args, **kwargs)
        if not func.is_view and not func._schema.is_mutable:
            results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.made.update((str(func.overloadpacket.__name__), x.dtype, tuple(x.shape)) for x in results)
        if not tree_any(_is_host, out):
            return out
        if func is aten._to_copy.default and not kwargs.get("non_blocking"):
            self._wait()
        return tree_map_only(FakeTensor, lambda x: _zeros(x) if _is_host(x) else x, out)

    def _wait(self) -> None:
        assert not self._is_recording, f"{place()} waits for the device in a graph"
        self.waits[place()] += 1

    @contextmanager
    def recording(self, graph: Any, pool: Any = None) -> Iterator[None]:
        """torch.cuda.graph."""
        self.recorded, self._is_recording = self.recorded + 1, True
        yield
        self._is_recording = False


def _is_of_device(args: tuple, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))


def _is_host(x: Any) -> bool:
    return isinstance(x, FakeTensor) and x.device.type == "cpu"


def _zeros(x: FakeTensor) -> torch.Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


def place() -> str:
    """The innermost line of the engine on the stack."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("r1engine", "r1kernels", "megatron"):
            if f"/{package}/" in frame.filename and "/support/" not in frame.filename:
                return f"{package}/{frame.filename.rpartition(f'/{package}/')[2]}:{frame.name}"
    return "outside of the engine"


def start(library: Path) -> FakeGpu:
    """Put the GPU in place, for this process and for good; the mode is entered by the caller."""
    ctypes.CDLL(str(library)).install()
    torch.autograd.set_multithreading_enabled(False)  # the mode is of this thread
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then passes through the mode
    edge.replace()
    fake_tensor.init_gpu_context = lambda device: None
    FakeTensor.tolist = lambda self: self.cpu().tolist()  # its own asks for one number after the other
    gpu = FakeGpu(record())
    torch.cuda.graph = gpu.recording
    return gpu


def store() -> Any:
    """For torch.distributed.init_process_group("fake", ...), whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
