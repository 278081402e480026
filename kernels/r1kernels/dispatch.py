"""The checks and the choice of implementation that every op shares."""

from __future__ import annotations

from typing import Literal

import torch

Impl = Literal["reference"]


def choose(op: str, impl: str | None, have: tuple[str, ...]) -> str:
    """Return the implementation to run: the one asked for, or the first of `have`.

    Raises:
        ValueError: `impl` names an implementation that this op does not have.
    """
    if impl is not None and impl not in have:
        raise ValueError(f"{op}: impl={impl!r} does not exist; this op has {', '.join(have)}")
    return impl or have[0]


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
    """Require a floating-point tensor.

    Raises:
        ValueError: the tensor holds integers, booleans or complex numbers.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
