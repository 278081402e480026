"""The checks and the choice of implementation that every op shares."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal

import torch

from r1kernels import cuda_lib

Impl = Literal["reference", "triton", "cuda", "deep_gemm"]
DEEP_GEMM = "sgl-deep-gemm==0.2.2"  # loads with torch 2.11; 0.2.3 and later do not, 0.1.3 and earlier lack a call
DEEP_GEMM_CALLS = ("m_grouped_fp8_gemm_nt_contiguous", "k_grouped_fp8_gemm_nt_contiguous")


def choose(op: str, impl: str | None, tensor: torch.Tensor, have: tuple[str, ...]) -> str:
    """Return the implementation to run: the one asked for, or the best one that runs where `tensor` is.

    Without a wish it is the reference on a CPU, and on a GPU the first of `have` that this machine can run; that
    choice is logged once for each op.

    Args:
        op:     name, for messages.
        impl:   the caller's wish, or None.
        tensor: an input; its device decides.
        have:   the op's implementations, the fastest on a GPU first.

    Raises:
        ValueError: `impl` names an implementation that this op does not have.
        RuntimeError: `impl` cannot run on this machine or on the tensor's device; the message says why.
    """
    return choose_on(op, impl, tensor.device.type, have)


def choose_on(op: str, impl: str | None, device: str, have: tuple[str, ...]) -> str:
    """`choose` for tensors on a kind of device."""
    if impl is not None and impl not in have:
        raise ValueError(f"{op}: impl={impl!r} does not exist; this op has {', '.join(have)}")
    if impl is not None:
        if reason := why_not(impl, device):
            raise RuntimeError(f"{op}: impl={impl!r} {reason}")
        return impl
    if device == "cpu":
        return "reference"
    chosen = next(name for name in have if why_not(name, device) is None)
    _log_choice(op, chosen, device)
    return chosen


@cache
def _log_choice(op: str, impl: str, device: str) -> None:
    logging.getLogger("r1kernels").info("%s: %s on %s", op, impl, device)


def why_not(impl: str, device: str) -> str | None:
    """Why `impl` cannot run on tensors of this kind of device; None if it can."""
    if impl == "reference":
        return None
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "needs triton: pip install triton"
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if device == "cuda" or is_interpreted else f"on a {device} tensor needs TRITON_INTERPRET=1"
    if device != "cuda":
        return f"needs a cuda tensor, got one on {device}"
    if impl == "deep_gemm":
        if (problem := deep_gemm_problem()) is not None:
            return problem
        major = torch.cuda.get_device_capability()[0]
        return None if major == 9 else f"needs a GPU of compute capability 9, got {major}"
    return None if cuda_lib.available() else "needs the compiled library: run `pip install .` where nvcc is on PATH"


@cache
def deep_gemm_problem() -> str | None:
    """Why DeepGEMM cannot be imported; None if it can. A wheel for another PyTorch is there and does not load."""
    install = f"pip install {DEEP_GEMM}"
    if importlib.util.find_spec("deep_gemm") is None:
        return f"needs DeepGEMM: {install}"
    try:
        import deep_gemm
    except Exception as error:  # OSError of the loader, ImportError, what its own start raises
        reason = f"{type(error).__name__}: {error}"
        logging.getLogger("r1kernels").warning("DeepGEMM does not load: %s", reason)
        return f"needs a DeepGEMM for torch {torch.__version__}, found one that does not load ({reason}): {install}"
    missing = [name for name in DEEP_GEMM_CALLS if not hasattr(deep_gemm, name)]
    return f"needs a DeepGEMM with {', '.join(missing)}: {install}" if missing else None


def check_same_shape(op: str, first: tuple[str, torch.Tensor], *others: tuple[str, torch.Tensor | None]) -> None:
    """Require that every given tensor has the first one's shape and device.

    Raises:
        ValueError: naming the op, the argument, what was found and what is required.
    """
    name, tensor = first
    for other_name, other in others:
        if other is not None and (other.shape != tensor.shape or other.device != tensor.device):
            raise ValueError(
                f"{op}: {other_name} is {tuple(other.shape)} on {other.device}, "
                f"but {name} is {tuple(tensor.shape)} on {tensor.device}"
            )


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    """Require a plain floating-point tensor.

    Raises:
        ValueError: the tensor holds integers, booleans or complex numbers, or is a DTensor.
        RuntimeError: the op is called inside torch.vmap.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    check_plain(op, name, tensor)


def check_plain(op: str, name: str, tensor: torch.Tensor) -> None:
    """Require a tensor that is all on this rank, and its own: neither a DTensor nor one that torch.func has wrapped.

    Raises:
        ValueError: a DTensor.
        RuntimeError: the op is called inside torch.vmap or another transform of torch.func.
    """
    if torch.compiler.is_compiling():
        return  # what a graph may hold is another question
    if torch._C._functorch.is_batchedtensor(tensor):
        raise RuntimeError(
            f"{op}: {name} was found inside torch.vmap; required the whole batch in one call, as leading dimensions"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # torch.library registers no gradient for torch.func
        raise RuntimeError(f"{op}: {name} was found inside torch.func; required torch.autograd.grad or backward()")
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{op}: {name} must be a plain tensor, got a DTensor of {tensor.placements}; required "  # type: ignore[attr-defined]  # of a DTensor
            f"{name}.full_tensor(), or {name}.to_local() and tp_group for a vocabulary that is split over ranks"
        )
