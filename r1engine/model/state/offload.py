"""Moves tensors between device and host memory by their storages, so that every view of them stays valid; lends a model
other weights for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch


class Offloader:
    """Empties device storages into pinned host memory and fills them again.

    The tensors keep their identity: parameters that are views of one flat buffer, and optimizers that hold
    them, notice nothing.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], *, is_on: bool) -> None:
        """
        Args:
            tensors: lists the tensors to move; asked at each offload, as optimizer state appears late.
            is_on:   False makes both calls do nothing.
        """
        self._tensors, self._is_on = tensors, is_on
        self._saved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def offload(self) -> None:
        """Copy every distinct storage to the host and free its device memory."""
        if not self._is_on or self._saved:
            return
        storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in self._tensors())}
        for storage in storages.values():
            if storage.nbytes():
                self._saved.append((storage, self._copy(storage)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for storage, _ in self._saved:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda).untyped_storage()
        return host.copy_(storage, non_blocking=True)

    def restore(self) -> None:
        """Bring the contents back."""
        for storage, host in self._saved:
            storage.resize_(host.nbytes())
            storage.copy_(host, non_blocking=True)
        if self._saved and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._saved = []


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
