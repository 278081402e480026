"""Adam with its master weights and moments in host memory, updated there by PyTorch's fused CPU kernel.

Of the 18 bytes that training needs for a parameter, 12 leave the GPU for good; each update moves 4 bytes of gradient
down and 2 of weight up. Megatron still reduces the gradients, takes their norm and clips them, on the GPU. Its own
offload (HybridDeviceOptimizer) runs on CUDA only, and keeps the master weights on the GPU too unless its
precision-aware optimizer takes them away; this one is the same code with and without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

BUCKET = 1 << 25  # elements that travel together: 128 MiB of gradients
STATE_BYTES = 12  # of an element in host memory: master weight and two moments, float32


@dataclass(frozen=True)
class Place:
    """One tensor that Adam updates."""

    main: torch.Tensor  # where Megatron puts the gradient, and the key of what belongs to it
    weight: Callable[[], torch.Tensor]  # flat part of the model's parameter that it is the master of


@dataclass
class HostBucket:
    """Places whose gradients travel together."""

    places: list[Place]
    masters: list[torch.Tensor]  # float32 in host memory, flat
    adam: torch.optim.AdamW
    group: dict[str, Any]  # Megatron's parameter group, which says the learning rate

    @property
    def size(self) -> int:
        return sum(len(master) for master in self.masters)


class HostAdam:
    """Stands where Megatron has its torch.optim.Optimizer."""

    def __init__(self, param_groups: list[dict[str, Any]], places: Iterable[Place]) -> None:
        """Copy the weights to the host and free the master weights on the device.

        Args:
            param_groups: of the optimizer that this one replaces.
            places:       every tensor in them.

        Raises:
            RuntimeError: the host has less memory than the ranks on it need.
        """
        self.param_groups = param_groups
        self.state: dict[torch.Tensor, dict[str, Any]] = {}
        by_main = {place.main: place for place in places}
        _check_memory(sum(main.numel() for main in by_main))
        self._buckets = [
            bucket for group in param_groups for bucket in _buckets([by_main[p] for p in group["params"]], group)
        ]
        self._holder = {
            place.main: (bucket.adam, master)
            for bucket in self._buckets
            for place, master in zip(bucket.places, bucket.masters, strict=True)
        }
        self._copies = torch.cuda.Stream() if any(main.is_cuda for main in by_main) else None
        self._down: list[torch.Tensor] = []  # two, so that one is filled while the other is used
        self._up: list[torch.Tensor] = []
        self.read()
        for main in by_main:
            if main.untyped_storage().data_ptr() != by_main[main].weight().untyped_storage().data_ptr():
                main.untyped_storage().resize_(0)  # a master copy; a float32 weight is its own

    def holder(self, main: torch.Tensor) -> tuple[torch.optim.AdamW, torch.Tensor]:
        """The optimizer on the host and its tensor that stand for `main`."""
        return self._holder[main]

    @torch.no_grad()
    def read(self) -> None:
        """Take the model's weights for the master weights."""
        for bucket in self._buckets:
            for place, master in zip(bucket.places, bucket.masters, strict=True):
                master.copy_(place.weight())

    @torch.no_grad()
    def step(self) -> None:
        """Update masters, moments and the model's weights by the gradients that lie at the places' `main`.

        While the CPU updates a bucket, the next one's gradients come down and the weights of the one before go up.
        """
        self._make_room()
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream())
        arrived = [self._fetch(i) for i in range(min(1, len(self._buckets)))]
        left: list[Any] = []
        for i, bucket in enumerate(self._buckets):
            if i + 1 < len(self._buckets):
                arrived.append(self._fetch(i + 1))
            _wait(arrived[i])
            for key in ("lr", "weight_decay"):
                bucket.adam.param_groups[0][key] = bucket.group[key]
            bucket.adam.step()
            bucket.adam.zero_grad()
            _wait(left[i - 2] if i >= 2 else None)
            left.append(self._send(i))
        if self._copies is not None:
            torch.cuda.current_stream().wait_stream(self._copies)

    def _make_room(self) -> None:
        """Pinned memory for two buckets on their way down and two on their way up."""
        if self._down or not self._buckets:
            return
        size, pin = max(bucket.size for bucket in self._buckets), self._copies is not None
        dtype = self._buckets[0].places[0].weight().dtype
        self._down = [torch.empty(size, pin_memory=pin) for _ in range(2)]
        self._up = [torch.empty(size, dtype=dtype, pin_memory=pin) for _ in range(2)]

    def _fetch(self, index: int) -> Any:
        """Start the copy of a bucket's gradients to the host."""
        bucket = self._buckets[index]
        with torch.cuda.stream(self._copies):
            for place, master, room in _rooms(bucket, self._down[index % 2]):
                assert place.main.grad is not None
                room.copy_(place.main.grad.flatten(), non_blocking=True)
                master.grad = room
            return self._copies.record_event() if self._copies is not None else None

    def _send(self, index: int) -> Any:
        """Start the copy of a bucket's new weights to the device, in the model's precision."""
        bucket = self._buckets[index]
        with torch.cuda.stream(self._copies):
            for place, master, room in _rooms(bucket, self._up[index % 2]):
                place.weight().copy_(room.copy_(master), non_blocking=True)
            return self._copies.record_event() if self._copies is not None else None


def _buckets(places: list[Place], group: dict[str, Any]) -> Iterator[HostBucket]:
    """The places of a parameter group, in order; a tensor larger than a bucket has one to itself."""
    while places:
        count, size = 1, places[0].main.numel()
        while count < len(places) and size + places[count].main.numel() <= BUCKET:
            size += places[count].main.numel()
            count += 1
        masters = [torch.empty(place.main.numel()) for place in places[:count]]
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        yield HostBucket(places[:count], masters, torch.optim.AdamW(masters, fused=True, **options), group)
        places = places[count:]


def _rooms(bucket: HostBucket, staging: torch.Tensor) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor]]:
    """(place, master, its part of the staging memory)."""
    sizes = [len(master) for master in bucket.masters]
    yield from zip(bucket.places, bucket.masters, staging[: sum(sizes)].split(sizes), strict=True)


def _wait(event: Any) -> None:
    if event is not None:
        event.synchronize()


def _check_memory(elements: int) -> None:
    """Refuse what the host cannot hold, before the first run out of memory kills a rank."""
    # Of all there is: what is free depends on how far the other ranks are.
    ranks, memory = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), psutil.virtual_memory().total
    if ranks * STATE_BYTES * elements > memory:
        raise RuntimeError(
            f"optimizer.offload: found {memory / 2**30:.1f} GiB of host memory, required "
            f"{ranks * STATE_BYTES * elements / 2**30:.1f} GiB for the master weights and moments of {ranks} rank(s)"
        )
