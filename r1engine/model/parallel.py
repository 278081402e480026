"""Process groups: torch.distributed and Megatron's tensor / pipeline / context / expert / data layout of the ranks."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from r1engine.config import Parallel
from r1engine.hf.layout import check_sizes


@dataclass(frozen=True)
class World:
    """Where this process stands."""

    rank: int
    size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int = 0  # expert parallelism: which of the experts
    ep_size: int = 1
    etp_rank: int = 0  # tensor parallelism inside an expert
    etp_size: int = 1
    cp_rank: int = 0  # context parallelism: which tokens of a row
    cp_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters."""
        return self.dp_size * self.cp_size

    @property
    def expert_dp_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.size // (self.ep_size * self.etp_size * self.pp_size)


def join(layout: Parallel) -> World:
    """Start torch.distributed (NCCL on GPUs, gloo on CPUs) and Megatron's process groups.

    Under torchrun the ranks meet through its environment variables; a single process needs no port.

    Raises:
        ValueError: the sizes do not fit the number of processes.
        RuntimeError: the rendezvous port is taken.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    check_sizes(size, layout)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _start_distributed("nccl" if has_gpu else "gloo", size)
    from megatron.core import parallel_state as ps

    if not ps.model_parallel_is_initialized():
        with contextlib.nullcontext() if has_gpu else _one_group_for_the_same_ranks():
            start_groups(layout)
    return World(
        rank=dist.get_rank(),
        size=size,
        device=device,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=layout.tensor,
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=layout.pipeline,
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        ep_size=layout.expert,
        etp_rank=ps.get_expert_tensor_parallel_rank(),
        etp_size=layout.expert_tensor,
        cp_rank=ps.get_context_parallel_rank(),
        cp_size=layout.context,
    )


def start_groups(layout: Parallel) -> None:
    """Megatron's process groups over a torch.distributed that is up."""
    from megatron.core import parallel_state as ps

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,  # for checkpoint formats that are not ours
    )


@contextlib.contextmanager
def _one_group_for_the_same_ranks() -> Iterator[None]:
    """Inside, Megatron's groups of the same ranks are one gloo group.

    Megatron makes more than twenty, on a few ranks most of them alike, and drops them without closing them. Each
    costs three threads, one of which wakes a hundred times a second for as long as the process lives.
    """
    from megatron.core import parallel_state as ps

    original = ps.create_group
    ps.create_group = lambda ranks, **_: _gloo_group(tuple(ranks))
    try:
        yield
    finally:
        ps.create_group = original


@functools.cache
def _gloo_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), backend="gloo")


def _start_distributed(backend: str, size: int) -> None:
    if "RANK" not in os.environ:
        store = dist.FileStore(str(Path(tempfile.mkdtemp(prefix="r1engine-")) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"parallel: the {size} ranks cannot meet at {address} ({error}); "
            "if the port is in use, choose another one with torchrun --master-port or MASTER_PORT"
        ) from error


def leave() -> None:
    """Tear the process groups down."""
    from megatron.core import parallel_state as ps

    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _gloo_group.cache_clear()
