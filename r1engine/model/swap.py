"""Lends a model other weights for a moment, without writing its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


@contextlib.contextmanager
def lent_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, every parameter is the tensor of its name in `weights`; outside, its own."""
    parameters = dict(model.named_parameters())
    own = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = weights[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = own[name]
