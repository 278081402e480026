"""The group of all ranks of the trainer and all receivers, in which any two send each other bytes (NCCL or gloo)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MEET_SECONDS = 120.0  # that a member waits for the others; a transfer that takes longer has failed


@dataclass(frozen=True)
class Meeting:
    """Where the members meet."""

    host: str
    port: int
    size: int  # members
    name: str


@dataclass(frozen=True)
class Transfer:
    """Bytes to or from another member."""

    data: torch.Tensor  # [bytes] uint8, contiguous
    peer: int
    tag: int  # the same on both sides; gloo tells messages apart by it, NCCL by their order


class PeerGroup:
    """This process as one member."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device) -> None:
        """Meets the others; member 0 listens.

        Raises:
            RuntimeError: they do not come in time.
        """
        timeout = timedelta(seconds=MEET_SECONDS)
        # Not by a rendezvous: under torchrun that waits for a store of torchrun's at this address.
        tcp = dist.TCPStore(meeting.host, meeting.port, meeting.size, rank == 0, timeout, wait_for_workers=False)
        store = dist.PrefixStore(meeting.name, tcp)
        self._device = device
        self._group: Any  # a ProcessGroupGloo or a ProcessGroupNCCL, whose calls are not declared
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, meeting.size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, meeting.size, timeout)

    def exchange(self, sends: Iterable[Transfer], receives: Iterable[Transfer] = ()) -> None:
        """All transfers at once; returns when they are done. Between two members, both name them in the same order.

        Raises:
            RuntimeError: a member has ended, or does not take part in time.
        """
        out, into = ([t for t in transfers if len(t.data)] for transfers in (sends, receives))
        if not out and not into:
            return
        if self._device.type == "cuda":
            self._group._start_coalescing(self._device)  # else NCCL would do one transfer after the other
        works = [self._group.send([t.data], t.peer, t.tag) for t in out]
        works += [self._group.recv([t.data], t.peer, t.tag) for t in into]
        if self._device.type == "cuda":
            works = [self._group._end_coalescing(self._device)]
        for work in works:
            work.wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def leave(self) -> None:
        """Whoever waits for this member fails."""
        self._group.abort()
