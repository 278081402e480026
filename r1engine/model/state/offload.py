"""Moves tensors between device and host memory by their storages, so that every view of them stays valid; lends a model
other weights for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from r1engine.model.state.optimizer_state import held


class Offloader:
    """Empties device storages into pinned host memory and fills them again.

    The tensors keep their identity: parameters that are views of one flat buffer, and optimizers that hold
    them, notice nothing. But their memory is gone in between: who reads them then reads nothing, or what others wrote.
    """

    DEVICE_TYPES = frozenset({"cuda"})  # whose memory others want; from a CPU's storages nothing is gained

    def __init__(
        self,
        tensors: Callable[[], Iterable[torch.Tensor]],
        device: torch.device,
        *,
        is_on: bool,
        scratch: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        """
        Args:
            tensors: lists the tensors to move; asked at each offload, as optimizer state appears late.
            device:  where they are; both calls do nothing on a CPU,
            is_on:   and nothing where this is False.
            scratch: lists tensors whose contents nobody wants: they are not copied, and come back as zeros.
        """
        self._tensors, self._scratch = tensors, scratch
        self._is_on = is_on and device.type in self.DEVICE_TYPES
        self._saved: list[tuple[torch.UntypedStorage, torch.UntypedStorage | int]] = []  # or its bytes, of scratch

    def check_awake(self) -> None:
        """For what reads or writes the tensors: that their contents are not in host memory."""
        assert not self._saved, "policy: its weights are in host memory, required `with policy.awake()`"

    def offload(self) -> None:
        """Copy every distinct storage to the host and free its device memory."""
        if not self._is_on or self._saved:
            return
        moved, scratch = _storages(self._tensors()), _storages(self._scratch())
        self._saved += [(storage, self._copy(storage)) for storage in moved.values()]
        self._saved += [(storage, storage.nbytes()) for at, storage in scratch.items() if at not in moved]
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
            if isinstance(host, int):
                storage.resize_(host)
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
            else:
                storage.resize_(host.nbytes())
                storage.copy_(host, non_blocking=True)
        if self._saved and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._saved = []


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each once. What other processes share (on a CPU: what a checkpoint has written) is not ours to free."""
    found = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors)}
    return {at: storage for at, storage in found.items() if storage.nbytes() and storage.resizable()}


def gradients(chunks: list[Any]) -> Iterator[torch.Tensor]:
    """The buffers of gradients, which each update sets to zero before it adds to them."""
    for chunk in chunks:
        yield from (buffer.grad_data for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers])


def moved(weights: Mapping[str, torch.Tensor], chunks: list[Any], optimizer: Any) -> Iterator[torch.Tensor]:
    """What a training state has in device memory beside its gradients: weights, and optimizer state that does not live
    on the host.

    Args:
        weights:   of this rank.
        chunks:    Megatron's DistributedDataParallel around the layers.
        optimizer: Megatron's.
    """
    yield from (tensor.data for tensor in weights.values())
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            if buffer.param_data is not None:
                yield buffer.param_data
    for item in held(optimizer):
        if item.main is not None and not item.is_on_host:
            yield item.main.data
            yield from (x for x in item.inner.state.get(item.main, {}).values() if torch.is_tensor(x))


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
