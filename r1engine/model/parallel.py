"""Process groups: torch.distributed and Megatron's tensor / pipeline / context / expert / data layout of the ranks."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from r1engine.config import Parallel
from r1engine.hf.architecture import Architecture


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


def check_sizes(world_size: int, layout: Parallel) -> None:
    """Whether the sizes make up the processes.

    Raises:
        ValueError: tensor x pipeline x context (x data), or the experts' share, does not fit their number.
    """
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline}
    if layout.context > 1:
        sizes["context"] = layout.context
    if layout.data is not None:
        sizes["data"] = layout.data
    ranks = math.prod(sizes.values())
    if world_size % ranks or (layout.data is not None and ranks != world_size):
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"parallel: {wanted} does not fit {world_size} process{'es' * (world_size > 1)}; "
            f"start with torchrun --nproc-per-node {ranks} or change the sizes"
        )
    experts = layout.expert * layout.expert_tensor * layout.pipeline
    if world_size % experts:
        raise ValueError(
            f"parallel: expert={layout.expert} x expert_tensor={layout.expert_tensor} x pipeline={layout.pipeline} = "
            f"{experts} does not divide {world_size} process{'es' * (world_size > 1)}"
        )


def check_layout(arch: Architecture, layout: Parallel) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        ValueError: naming the size, what it does not divide, and both numbers.
    """
    sizes = {"attention heads": arch.num_heads, "intermediate size": arch.intermediate_size}
    if arch.mla is None:
        sizes["key/value heads"] = arch.num_kv_heads
    else:
        sizes["kv_lora_rank + qk_rope_head_dim"] = arch.mla.kv_rank + arch.mla.rope_dim
        if arch.mla.query_rank is not None:
            sizes["q_lora_rank"] = arch.mla.query_rank
    if arch.moe is not None and arch.moe.shared_size:
        sizes["intermediate size of the shared experts"] = arch.moe.shared_size
    for what, size in sizes.items():
        if size % layout.tensor:
            raise ValueError(f"parallel.tensor: {layout.tensor} does not divide the model's {what} ({size})")
    _check_experts(arch, layout)
    _check_stages(arch.num_layers, layout)


def _check_experts(arch: Architecture, layout: Parallel) -> None:
    if arch.moe is None:
        for key, size in (("expert", layout.expert), ("expert_tensor", layout.expert_tensor)):
            if size > 1:
                raise ValueError(f"parallel.{key}: found {size}, required 1: the model has no experts")
        return
    if arch.moe.num_experts % layout.expert:
        raise ValueError(f"parallel.expert: {layout.expert} does not divide the model's {arch.moe.num_experts} experts")
    if arch.moe.intermediate_size % layout.expert_tensor:
        raise ValueError(
            f"parallel.expert_tensor: {layout.expert_tensor} does not divide the intermediate size of an expert "
            f"({arch.moe.intermediate_size})"
        )
    if layout.tensor > 1 and layout.sequence is False:
        raise ValueError("parallel.sequence: found false, required null or true: experts with tensor > 1 need it")


def _check_stages(num_layers: int, layout: Parallel) -> None:
    if layout.virtual > 1 and layout.pipeline == 1:
        raise ValueError(f"parallel.virtual: found {layout.virtual}, required 1 with pipeline = 1")
    ends = [n for n in (layout.first_stage_layers, layout.last_stage_layers) if n is not None]
    if ends and layout.pipeline == 1:
        raise ValueError("parallel.first_stage_layers, last_stage_layers: required null with pipeline = 1")
    between, stages = num_layers - sum(ends), layout.pipeline - len(ends)
    if between < 0 or (stages == 0 and between):
        raise ValueError(
            f"parallel: first_stage_layers + last_stage_layers = {sum(ends)} do not leave the right number of the "
            f"model's {num_layers} layers to {stages} stages"
        )
    if stages and between % (stages * layout.virtual):
        each = f"pipeline {stages}" if not ends else f"{stages} stages between the ends"
        raise ValueError(
            f"parallel.pipeline: {each}{f' x virtual {layout.virtual}' if layout.virtual > 1 else ''} does not divide "
            f"the model's {between} layers"
        )
    if any(n % layout.virtual for n in ends):
        raise ValueError(f"parallel.virtual: {layout.virtual} does not divide the layers of an end stage ({ends})")


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
