"""Megatron's process groups: the tensor / pipeline / context / expert / data layout of the ranks."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from r1engine.config import Parallel
from r1engine.ranks import World, start, stop


def join(layout: Parallel) -> World:
    """Start torch.distributed, unless it runs, and Megatron's process groups in this layout; where this rank stands.

    Raises:
        ValueError: the sizes do not fit the number of processes.
        RuntimeError: the rendezvous port is taken.
    """
    layout.data_ranks(int(os.environ.get("WORLD_SIZE", "1")))
    here = start(layout.timeout_minutes)
    from megatron.core import parallel_state as ps

    if not ps.model_parallel_is_initialized():
        with contextlib.nullcontext() if here.device.type == "cuda" else _one_group_for_the_same_ranks():
            start_groups(layout)
    return replace(
        here,
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
        distributed_timeout_minutes=layout.timeout_minutes,
    )


@contextlib.contextmanager
def _one_group_for_the_same_ranks() -> Iterator[None]:
    """Inside, Megatron's groups of the same ranks are one gloo group.

    Megatron makes more than twenty, on a few ranks most of them alike, and drops them without closing them. Each
    costs three threads, one of which wakes a hundred times a second for as long as the process lives.
    """
    from megatron.core import parallel_state as ps

    original = ps.create_group
    ps.create_group = lambda ranks, timeout=None, **_: _gloo_group(tuple(ranks), timeout)
    try:
        yield
    finally:
        ps.create_group = original


@functools.cache
def _gloo_group(ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), backend="gloo", timeout=timeout)


def leave_layout() -> None:
    """End Megatron's process groups; torch.distributed goes on, so that another layout can be joined."""
    from megatron.core import parallel_state as ps

    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()


def leave() -> None:
    """End Megatron's process groups and torch.distributed."""
    leave_layout()
    stop()
    _gloo_group.cache_clear()
