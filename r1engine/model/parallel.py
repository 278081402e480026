"""Process groups: torch.distributed and Megatron's tensor / pipeline / data layout of the ranks."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


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

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join(tensor: int, pipeline: int, data: int | None = None) -> World:
    """Start torch.distributed (NCCL on GPUs, gloo on CPUs) and Megatron's process groups.

    Under torchrun the ranks meet through its environment variables; a single process needs no port.

    Raises:
        ValueError: the sizes do not fit the number of processes.
        RuntimeError: the rendezvous port is taken.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    check_sizes(size, tensor, pipeline, data)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _start_distributed("nccl" if has_gpu else "gloo", size)
    from megatron.core import parallel_state as ps

    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    return World(
        rank=dist.get_rank(),
        size=size,
        device=device,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=tensor,
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=pipeline,
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
    )


def check_sizes(world_size: int, tensor: int, pipeline: int, data: int | None) -> None:
    """Raises ValueError when tensor x pipeline (x data) is not the number of processes."""
    if world_size % (tensor * pipeline) or (data is not None and tensor * pipeline * data != world_size):
        wanted = f"tensor={tensor} x pipeline={pipeline}" + (f" x data={data}" if data is not None else "")
        raise ValueError(
            f"parallel: {wanted} does not fit {world_size} process{'es' * (world_size > 1)}; "
            f"start with torchrun --nproc-per-node {tensor * pipeline * (data or 1)} or change the sizes"
        )


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
