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
from torch.optim.adamw import adamw

BUCKET = 1 << 25  # elements that travel together: 128 MiB of gradients
STATE_BYTES = 12  # of an element in host memory: master weight and two moments, float32


@dataclass(frozen=True)
class Place:
    """One tensor that Adam updates."""

    main: torch.Tensor  # where Megatron puts the gradient, and the key of what belongs to it
    weight: Callable[[], torch.Tensor]  # flat part of the model's parameter that it is the master of


@dataclass(frozen=True)
class Piece:
    """Elements of a place, at most BUCKET."""

    place: Place
    master: torch.Tensor  # of the whole place, float32 in host memory, flat
    part: slice

    @property
    def size(self) -> int:
        return self.part.stop - self.part.start


@dataclass(frozen=True)
class HostBucket:
    """Pieces whose gradients travel together."""

    pieces: list[Piece]
    adam: torch.optim.AdamW  # holds the masters of a parameter group and their state
    group: dict[str, Any]  # Megatron's parameter group, which says the learning rate

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


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
        self._buckets: list[HostBucket] = []
        self._holder: dict[torch.Tensor, tuple[torch.optim.AdamW, torch.Tensor]] = {}
        for group in param_groups:
            masters = [torch.empty(main.numel()) for main in group["params"]]
            if masters:
                adam = torch.optim.AdamW(masters, fused=True)
                self._holder |= {main: (adam, master) for main, master in zip(group["params"], masters, strict=True)}
                pieces = _pieces([(by_main[p], m) for p, m in zip(group["params"], masters, strict=True)])
                self._buckets += [HostBucket(part, adam, group) for part in pieces]
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
            for piece in bucket.pieces:
                piece.master[piece.part].copy_(piece.place.weight()[piece.part])

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
            _update(bucket, self._down[i % 2])
            _wait(left[i - 2] if i >= 2 else None)
            left.append(self._send(i))
        for adam, master in self._holder.values():
            adam.state[master]["step"] += 1
        if self._copies is not None:
            torch.cuda.current_stream().wait_stream(self._copies)

    def _make_room(self) -> None:
        """The first moments, and pinned memory for two buckets on their way down and two on their way up."""
        for adam, master in self._holder.values():
            if master not in adam.state:
                moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[master] = {"step": torch.tensor(0.0), **moments}
        if self._down or not self._buckets:
            return
        size, pin = max(bucket.size for bucket in self._buckets), self._copies is not None
        dtype = self._buckets[0].pieces[0].place.weight().dtype
        self._down = [torch.empty(size, pin_memory=pin) for _ in range(2)]
        self._up = [torch.empty(size, dtype=dtype, pin_memory=pin) for _ in range(2)]

    def _fetch(self, index: int) -> Any:
        """Start the copy of a bucket's gradients to the host."""
        bucket = self._buckets[index]
        with torch.cuda.stream(self._copies):
            for piece, room in _rooms(bucket, self._down[index % 2]):
                assert piece.place.main.grad is not None
                room.copy_(piece.place.main.grad.flatten()[piece.part], non_blocking=True)
            return self._copies.record_event() if self._copies is not None else None

    def _send(self, index: int) -> Any:
        """Start the copy of a bucket's new weights to the device, in the model's precision."""
        bucket = self._buckets[index]
        with torch.cuda.stream(self._copies):
            for piece, room in _rooms(bucket, self._up[index % 2]):
                room.copy_(piece.master[piece.part])
                piece.place.weight()[piece.part].copy_(room, non_blocking=True)
            return self._copies.record_event() if self._copies is not None else None


def _pieces(places: list[tuple[Place, torch.Tensor]]) -> Iterator[list[Piece]]:
    """The pieces of each bucket: places with their masters in order, a place in several where it has more elements."""
    found: list[Piece] = []
    for place, master in places:
        for start in range(0, len(master), BUCKET):
            piece = Piece(place, master, slice(start, min(start + BUCKET, len(master))))
            if found and sum(other.size for other in found) + piece.size > BUCKET:
                yield found
                found = []
            found.append(piece)
    if found:
        yield found


def _rooms(bucket: HostBucket, staging: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """(piece, its part of the staging memory)."""
    sizes = [piece.size for piece in bucket.pieces]
    yield from zip(bucket.pieces, staging[: sum(sizes)].split(sizes), strict=True)


def _update(bucket: HostBucket, gradients: torch.Tensor) -> None:
    """What AdamW.step does, for the bucket's elements; whoever calls counts the step of the whole."""
    pieces, rooms = zip(*_rooms(bucket, gradients), strict=True)
    states = [bucket.adam.state[piece.master] for piece in pieces]

    def parts(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor[piece.part] for tensor, piece in zip(tensors, pieces, strict=True)]

    group = bucket.group
    adamw(
        parts(piece.master for piece in pieces),
        list(rooms),
        parts(state["exp_avg"] for state in states),
        parts(state["exp_avg_sq"] for state in states),
        [],
        [state["step"].clone() for state in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


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
