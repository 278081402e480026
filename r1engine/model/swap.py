"""Lends a model other weights for a moment, without writing its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


@contextlib.contextmanager
def lent_weights(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, every tensor of `own` (a parameter or buffer of a model) has the values of its name in `weights`;
    outside, its own."""
    kept = {name: tensor.data for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.data = weights[name]
        yield
    finally:
        for name, tensor in own.items():
            tensor.data = kept[name]
