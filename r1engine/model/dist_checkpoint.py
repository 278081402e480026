"""Model, optimizer and reference weights as a Megatron distributed checkpoint: every rank writes its shards."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from r1engine.model.swap import lent_weights

# The default sharding of the distributed optimizer cannot be saved in this Megatron version
# ("flattened_range is not supported"); this one can, for an unchanged data-parallel size.
METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


@dataclass(frozen=True)
class Model:
    """What is saved of a model."""

    chunks: list[torch.nn.Module]  # its chunks of layers on this rank
    local: dict[str, torch.Tensor]  # their weights, under names that a snapshot uses too

    def sharded(self, prefix: str = "") -> dict[str, Any]:
        """Megatron's description of the shards, chunk by chunk."""
        return {
            str(i): chunk.sharded_state_dict(prefix=prefix, metadata=METADATA) for i, chunk in enumerate(self.chunks)
        }

    def load(self, tree: dict[str, Any], prefix: str = "") -> None:
        """Copy what was read for `sharded` into the weights."""
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict({key.removeprefix(prefix): entry for key, entry in tree[str(i)].items()})


def _sharded(
    model: Model, optimizer: MegatronOptimizer, snapshot: dict[str, torch.Tensor] | None, is_loading: bool
) -> dict[str, Any]:
    state = model.sharded()
    tree = {"optimizer": optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=METADATA), "model": state}
    if snapshot is not None:
        tree["reference"] = _snapshot_shards(model, snapshot)
    return tree


def _snapshot_shards(model: Model, snapshot: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The snapshot's tensors, sharded as the parameters that they were copied from."""
    with lent_weights(model.local, snapshot):
        state = model.sharded("reference.")
        for chunk in state.values():
            for entry in chunk.values():
                if isinstance(getattr(entry, "data", None), torch.Tensor):
                    entry.data = entry.data.detach()  # what was lent, not the parameter that is restored at the exit
    return state


def save(folder: Path, model: Model, optimizer: MegatronOptimizer, snapshot: dict[str, torch.Tensor] | None) -> None:
    """Write into an existing empty folder. Collective.

    Raises:
        RuntimeError: a write failed (disk full, quota); the folder is then of no use.
    """
    # Megatron would start a manager process to carry results back from an asynchronous save: seconds, and an endless
    # loop in scripts without a __main__ guard. This save is synchronous: its results never leave the process.
    filesystem_async._results_queue = queue.Queue()
    try:
        dist_checkpointing.save(_sharded(model, optimizer, snapshot, is_loading=False), str(folder))
    except (CheckpointException, OSError) as error:  # the first is a BaseException; its last line says what failed
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(
            f"checkpoint: {folder} could not be written ({reason}); free some space and start the same command again: "
            "it goes on from the last whole checkpoint"
        ) from error


def load(
    folder: Path, model: Model, optimizer: MegatronOptimizer, snapshot: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """Read into the model, the optimizer and the tensors of `snapshot`; returns the latter. Collective."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in chain:
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            # Before its first step PyTorch's AdamW has no state to load into, which this class takes for an error.
            part._init_optimizer_states_with_dummy_values()
    tree = dist_checkpointing.load(_sharded(model, optimizer, snapshot, is_loading=True), str(folder))
    model.load(tree["model"])
    optimizer.load_state_dict(tree["optimizer"])
    for part in chain:
        if isinstance(part, DistributedOptimizer):
            _restore_adam_steps(part.optimizer)
    if snapshot is not None:
        with lent_weights(model.local, snapshot):
            model.load(tree["reference"], "reference.")
    return snapshot


def _restore_adam_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the step count of its group, which is the one in the checkpoint.

    Megatron hands PyTorch's AdamW one tensor for all parameters, each of which would count it up, and then writes
    this process's own count over it, that of the dummy step. (Transformer Engine's Adam counts in the group.)
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})  # none where the shard is empty
            if "step" in state:
                state["step"] = torch.full_like(state["step"], float(group["step"]))
