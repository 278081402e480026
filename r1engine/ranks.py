"""The ranks of a run: torch.distributed, where this process stands, and what the ranks tell each other. No Megatron.

Every rank runs the same program. Where one of them knows something, `from_first` tells the others; what each has of
its own, `everyones` brings together, and `at_first` where files are written. These three are for what is small, such as
a few numbers a completion: every rank holds it of all ranks. What is large goes by `exchange`, and only where it is
needed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from r1engine.cores import own_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks; the parallel coordinates are those of its model's layout."""

    rank: int
    size: int
    device: torch.device
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    ep_rank: int = 0  # expert parallelism: which of the experts
    ep_size: int = 1
    etp_rank: int = 0  # tensor parallelism inside an expert
    etp_size: int = 1
    cp_rank: int = 0  # context parallelism: which tokens of a row
    cp_size: int = 1
    timeout_minutes: int = 30  # a rank that waits longer for the others fails

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_first_of_shard(self) -> bool:
        """Whether this is the first of the ranks that compute the same rows together."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters."""
        return self.dp_size * self.cp_size

    @property
    def expert_dp_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.size // (self.ep_size * self.etp_size * self.pp_size)

    def from_first(self, make: Callable[[], Item]) -> Item:
        """What `make` returns on the first rank, on every rank; it runs only there. Collective.

        An exception of `make` is raised on every rank.
        """
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:
                if self.size == 1:
                    raise
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._objects())
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def once_a_node(self, make: Callable[[], Item]) -> Item:
        """What `make` returns on the first rank of this rank's node; it runs only there. Collective.

        An exception of `make` is raised on every rank of the run.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        outcome: tuple[Any, Exception | None] = (None, None)
        if local_rank == 0:
            try:
                outcome = make(), None
            except Exception as error:
                if self.size == 1:
                    raise
                outcome = None, error
        outcomes = self.everyones(outcome)
        for _, problem in outcomes:
            if problem is not None:
                raise problem
        return outcomes[self.rank - local_rank][0]  # torchrun numbers the ranks of a node one after the other

    def everyones(self, own: Item) -> list[Item]:
        """What every rank has, in the order of the ranks. Collective."""
        if self.size == 1:
            return [own]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, own, group=self._objects())
        return values

    def at_first(self, own: Item) -> list[Item]:
        """What every rank has, on the first rank, in the order of the ranks; on the others nothing. Collective."""
        if self.size == 1:
            return [own]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(own, values, dst=0, group=self._objects())
        return values or []

    def exchange(self, sent: Sequence[tuple[int, torch.Tensor]], received: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Send tensors to ranks, and fill others with what ranks send; both (rank, tensor in host memory).

        What one rank sends to another and what that one receives pair up in order, and are of the same sizes. A rank
        that neither sends nor receives need not call this.
        """
        group = self._objects()
        under_way = [dist.irecv(tensor, rank, group) for rank, tensor in received]
        under_way += [dist.isend(tensor, rank, group) for rank, tensor in sent]
        for one in under_way:
            if one is not None:
                one.wait()

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Inside, no other rank is inside; first come, first served. Not collective."""
        if self.size == 1:
            yield
            return
        store, key = dist.distributed_c10d._get_default_store(), f"r1engine/turn/{what}"
        number = store.add(key, 1)
        if number > 1:
            before = f"{key}/{number - 1}"
            store.wait([before], timedelta(minutes=self.timeout_minutes))
            store.delete_key(before)
        try:
            yield
        finally:
            store.set(f"{key}/{number}", "")

    def _objects(self) -> dist.ProcessGroup | None:
        """The group that carries Python objects: NCCL would hold those of all ranks in a GPU's memory at once."""
        return _host_group(self.timeout_minutes) if self.device.type == "cuda" else None

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


@cache
def _host_group(timeout_minutes: int) -> dist.ProcessGroup:
    """All ranks over gloo, in host memory. The first call is collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def interleaved(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """One list out of the shares of ranks that have every size-th item each: the inverse of items[rank::size]."""
    size, count = len(shares), sum(len(share) for share in shares)
    return [shares[i % size][i // size] for i in range(count)]


def spread(items: Sequence[Item], world: World, work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """Results of `work` over all items, in the items' order, the same on every rank. Collective.

    Args:
        items: the same on every rank.
        world: its ranks share the items.
        work:  called once with this rank's items (every size-th); returns one result an item.
    """
    return interleaved(world.everyones(work(list(items[world.rank :: world.size]))))


def start(timeout_minutes: int = 30) -> World:
    """Start torch.distributed (NCCL on GPUs, gloo on CPUs), unless it runs.

    Under torchrun the ranks meet through its environment variables; a single process needs no port.

    Args:
        timeout_minutes: a rank that waits longer for the others fails.

    Raises:
        RuntimeError: the rendezvous port is taken, or restarted ranks could not meet; or a rank has no GPU where there
            are some.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available()
    if has_gpu and local_rank >= (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise RuntimeError(
            f"parallel: found {count} GPUs (CUDA_VISIBLE_DEVICES: {visible}), required "
            f"one for each of the {os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} ranks of this node"
        )
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _meet("nccl" if has_gpu else "gloo", size, timedelta(minutes=timeout_minutes))
    return World(rank=dist.get_rank(), size=size, device=device, timeout_minutes=timeout_minutes)


def _meet(backend: str, size: int, timeout: timedelta) -> None:
    if "RANK" not in os.environ:
        alone = dist.FileStore(str(Path(tempfile.mkdtemp(prefix="r1engine-")) / "store"), 1)
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        return
    try:
        met, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = _without_earlier_starts(met, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"parallel: the {size} ranks cannot meet at {address} ({error}); "
            "if the port is in use, choose another one with torchrun --master-port or MASTER_PORT"
        ) from error


def _without_earlier_starts(store: dist.Store, size: int) -> dist.Store:
    """The store, without what the ranks of an earlier start wrote, before torchrun restarted them.

    torchrun (PyTorch 2.4 and later) keeps one store over its restarts, with the addresses of the ranks that have ended:
    the new ones would wait for those. Starts are told apart by their number, which only the ranks of one node share.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return store
    if os.environ["LOCAL_WORLD_SIZE"] != str(size):
        raise RuntimeError(
            "parallel: torchrun --max-restarts on several nodes would let restarted ranks meet through what their "
            "predecessors left; required TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )
    return dist.PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def is_first_to(what: str) -> bool:
    """Whether no other rank has asked for `what` before; not collective. It lets one of many ranks speak."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(f"r1engine/{what}", 1) == 1
    except dist.DistError:
        return False  # the rank that keeps the store has ended, and so was first


def common_problem(own: str | None, timeout_minutes: int) -> str | None:
    """What is wrong on any rank, each text once with its ranks, unless it is everyone's; None: nothing. Collective."""
    everyones = start(timeout_minutes).everyones(own)
    if len(set(everyones)) == 1:
        return own
    texts = dict.fromkeys(text for text in everyones if text is not None)
    return "\n".join(f"{_named([r for r, t in enumerate(everyones) if t == text])}: {text}" for text in texts)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def use_threads(threads: int | None) -> None:
    """PyTorch's CPU threads of this process; None: OMP_NUM_THREADS, or the cores of this rank."""
    if threads or "OMP_NUM_THREADS" not in os.environ:  # which PyTorch obeys
        torch.set_num_threads(threads or own_cores())


def stop() -> None:
    """Leave torch.distributed."""
    _host_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()
