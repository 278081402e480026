"""Makes Megatron-core 0.16 take the CPU for its device. Active only without CUDA, and only inside `on_cpu()`.

Megatron names "cuda" in the places listed here; nothing of its arithmetic is changed. Each entry says where
it is needed. tests/model/test_cpu.py fails when a Megatron upgrade makes one unnecessary or not enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# mallopt(3) of glibc: parameter -> value.
_KEEP_FREED_MEMORY = {
    -4: 0,  # M_MMAP_MAX: no mapping of its own for a large block, which would go back to the system when freed
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the heap shrinks only when 2 GiB lie free at its end
}
_TOP_PAD, _DEFAULT_TOP_PAD = -2, 128 * 2**10  # M_TOP_PAD: by how much more than it needs the heap grows
_LARGE_PAGES = 2**30  # bytes of the heap
_MADV_HUGEPAGE = 14


@functools.cache
def keep_freed_memory() -> None:
    """Makes malloc of this process reuse freed blocks of any size, from pages of 2 MiB where Linux has them.

    By default glibc returns blocks above 32 MiB to the system at once, and the end of the heap soon; the next step
    then takes a page fault for every 4 KiB of its activations. Does nothing where the C library has no mallopt.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for parameter, value in _KEEP_FREED_MEMORY.items():
        libc.mallopt(parameter, value)
    _grow_by_large_pages(libc)


def _grow_by_large_pages(libc: ctypes.CDLL) -> None:
    """Adds address space to the end of the heap and asks for large pages there; no memory is taken before its use.

    Most systems give them only where they are asked for ("madvise"), and glibc asks only if GLIBC_TUNABLES was set
    when the process started. A matrix then misses the address cache once in 2 MiB, not once in 4 KiB.
    """
    for function in (libc.malloc, libc.sbrk):
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.sbrk(0)
    libc.mallopt(_TOP_PAD, _LARGE_PAGES)
    libc.free(libc.malloc(2**26))  # more than lies free at the end: the heap grows
    libc.mallopt(_TOP_PAD, _DEFAULT_TOP_PAD)
    first = -(-start // 4096) * 4096
    libc.madvise(first, max(0, libc.sbrk(0) - first), _MADV_HUGEPAGE)


class _CudaMeansCpu(TorchFunctionMode):
    """Reads device="cuda" as "cpu", and lets Tensor.type() answer with the name of the CUDA type."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # schedules.py, optimizer.py, clip_grads.py and param_and_grad_buffer.py create tensors on "cuda".
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:  # language_module.py moves the tied weights of the pipeline's two ends
            return args[0]
        # DistributedOptimizer and clip_grads compare param.type() with "torch.cuda.FloatTensor".
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _patches() -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    def splits_as_lists(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        for name in ("input_splits", "output_splits"):
            value = getattr(self, name)
            setattr(self, name, value.tolist() if isinstance(value, torch.Tensor) else value)
        return tokens_per_expert

    return [
        (torch.cuda, "current_device", lambda: "cpu"),  # device argument in layers, rope, mappings, p2p, buffers
        (torch.cuda, "synchronize", lambda *_, **__: None),  # p2p_communication.py after every batched send
        (megatron_random, "_get_cuda_rng_state", get_rng_state),  # CheckpointFunction (recompute)
        (megatron_random, "_set_cuda_rng_state", set_rng_state),
        # It would open a stream for its copies to the host; gloo's all-to-all wants lists.
        (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", "none"),
        (MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", splits_as_lists),
    ]


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, Megatron-core runs on the CPU; outside, PyTorch is as it was. Does nothing where CUDA is present."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:
        for owner, name, value in _patches():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(_CudaMeansCpu())
        yield


def runs_on_cpu(method: Any) -> Any:
    """Decorate a function so that its body runs inside `on_cpu()`."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with on_cpu():
            return method(*args, **kwargs)

    return wrapped
