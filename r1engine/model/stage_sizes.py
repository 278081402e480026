"""The true Megatron model of any rank of any layout, built without memory and without the other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from r1engine.config import Model, Parallel
from r1engine.hf.architecture import Architecture
from r1engine.model.cpu import on_cpu
from r1engine.model.parallel import start_groups


def stage_parameters(arch: Architecture, model: Model, layout: Parallel, world_size: int) -> list[dict[str, int]]:
    """Name -> number of elements of every parameter that a rank of each pipeline stage holds.

    The modules are the ones that training builds, on PyTorch's meta device; the process groups of `world_size` ranks
    are stand-ins that send nothing.

    Args:
        arch:       what the model is.
        model:      how it is computed.
        layout:     parallel sizes.
        world_size: ranks of the run.

    Raises:
        RuntimeError: this process has joined a run already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "stage_parameters: this process has process groups already, required is a process of its own"
        )
    from r1engine.model.layers.gpt import build
    from r1engine.model.megatron_config import transformer_config

    found = []
    # In FP8 the parameters are the same; Transformer Engine may not be here.
    model = model.model_copy(update={"fp8": False})
    per_stage = world_size // layout.pipeline
    for stage in range(layout.pipeline):
        with _stand_in_groups(layout, rank=stage * per_stage, world_size=world_size), on_cpu(), torch.device("meta"):
            config = transformer_config(arch, model, layout, dtype=torch.bfloat16, on_cpu=True)
            config.perform_initialization = False  # nothing to fill
            names: dict[str, int] = {}
            for chunk in range(layout.virtual):
                with_mtp = model.mtp_loss_weight > 0
                built = build(arch, config, 1.0, with_mtp=with_mtp, stage=stage, chunk=chunk)
                names |= {f"{chunk}.{name}": p.numel() for name, p in built.named_parameters()}
            found.append(names)
    return found


@contextlib.contextmanager
def _stand_in_groups(layout: Parallel, *, rank: int, world_size: int) -> Iterator[None]:
    """Megatron's groups as seen by one rank, over PyTorch's "fake" backend."""
    from megatron.core import parallel_state as ps
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        start_groups(layout)
        yield
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()
