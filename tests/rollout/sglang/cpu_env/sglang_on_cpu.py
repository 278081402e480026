"""Test-only import hook that lets an unmodified sglang start without CUDA libraries; loaded by a .pth file.

It acts when the package it concerns is first imported:
- torchvision: its compiled part needs CUDA; its Python part registers two operators, which are declared here.
- sglang, where no triton is installed: sglang ships a stand-in for triton for its macOS build, installed here.
- sglang's DeepSeek attention: the torch_native backend has no rule for multi-head latent attention, and what it falls
  back to reads the wrong cache; the rule is registered here (a GPU server has its own).
- sglang's host buffers: they are registered with CUDA also where there is none; here that does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import platform
import sys

HANDLER = "sglang.srt.models.deepseek_common.attention_backend_handler"
HOST_BUFFERS = "sglang.srt.mem_cache.pool_host.common"


class _Hook(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.seen: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name in self.seen:
            return None
        if name == "torchvision":
            self.seen.add(name)
            _declare_torchvision_operators()
        elif name == "sglang":
            self.seen.add(name)
            _install_triton_stand_in()
        elif name in (HANDLER, HOST_BUFFERS):
            self.seen.add(name)
            spec = importlib.util.find_spec(name)
            then = _register_latent_attention if name == HANDLER else _register_no_buffers
            spec.loader.exec_module = _and_then(spec.loader.exec_module, then)
            return spec
        return None


def _declare_torchvision_operators() -> None:
    import torch

    global _library  # the declarations live as long as this object
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _install_triton_stand_in() -> None:
    if importlib.util.find_spec("triton") is not None:
        return
    import torch

    root = os.path.dirname(importlib.util.find_spec("sglang").origin)
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", os.path.join(root, "_platform_stubs.py"))
    stubs = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stubs
    spec.loader.exec_module(stubs)
    stubs._patch_non_blocking = lambda: None
    # The stand-in installs itself on an Apple machine only.
    machine = sys.platform, platform.machine, torch.backends.mps.is_available
    sys.platform, platform.machine, torch.backends.mps.is_available = "darwin", lambda: "arm64", lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        sys.platform, platform.machine, torch.backends.mps.is_available = machine


def _and_then(exec_module, then):
    def run(module) -> None:
        exec_module(module)
        then(module)

    return run


def _register_latent_attention(module) -> None:
    latent = module.AttnForwardMethod.MLA
    module.AttentionBackendRegistry.register("torch_native", lambda attention, forward_batch: latent)


def _register_no_buffers(module) -> None:
    module._cuda_host_register = lambda *args, **kwargs: None


sys.meta_path.insert(0, _Hook())
