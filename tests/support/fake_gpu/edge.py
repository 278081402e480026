"""What is replaced where PyTorch meets CUDA, so that nothing is asked of a driver that is not there."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

DEVICE = torch.device("cuda", 0)
TOTAL_MEMORY = 141 << 30


class Stream:
    """Of the device's; everything on it is done at once."""

    cuda_stream, device = 0, DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: None)


def replace() -> None:
    """Of an H200, as far as the engine and Megatron ask."""
    properties = SimpleNamespace(
        multi_processor_count=132, L2_cache_size=50 << 20, major=9, minor=0, name="fake H200", total_memory=TOTAL_MEMORY
    )
    answers = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
        "mem_get_info": lambda *_: (TOTAL_MEMORY, TOTAL_MEMORY),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "device_of": lambda tensor: nullcontext(),
        "nvtx": SimpleNamespace(range_push=lambda *_: None, range_pop=lambda: None),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.nn.Module._apply = _apply
    torch.Tensor.record_stream = lambda *_: None
    # Outside of a graph the ops call their kernels; for fake tensors they would be nodes of one.
    for name, module in list(sys.modules.items()):
        if name.startswith("r1kernels") and hasattr(module, "is_traced"):
            module.is_traced = lambda tensor: False


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Module.to: PyTorch's cannot put a fake tensor in the place of a real one. A parameter keeps its marks."""
    for module in self.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    moved = fn(tensor.detach())
                    if held is module._parameters:
                        moved = torch.nn.Parameter(moved, tensor.requires_grad)
                        moved.__dict__.update(tensor.__dict__)
                    held[name] = moved
    return self
