"""Model, optimizer and reference weights as a Megatron distributed checkpoint: every rank writes its shards, and a run
of another layout reads the parts of them that its ranks need."""

from __future__ import annotations

import logging
import queue
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from r1engine.model.state.offload import lent_weights
from r1engine.model.state.optimizer_state import Shard, restore, step_count, wanted_shards, written_shards
from r1engine.model.state.plain_pickles import only_plain

# Each save it tells that the first rank alone has what is not sharded of the optimizer: which is how it is meant.
logging.getLogger("megatron.core.dist_checkpointing.validation").addFilter(
    lambda record: "common state dict differs from rank 0" not in record.getMessage()
)


@dataclass(frozen=True)
class Saved:
    """What is saved of a model."""

    chunks: list[MegatronModule]  # its chunks of layers on this rank
    local: dict[str, torch.Tensor]  # their weights, under names that a snapshot uses too

    def sharded(self, prefix: str = "") -> dict[str, Any]:
        """Megatron's description of the shards, chunk by chunk: tensors alone."""
        return {
            str(i): {key: x for key, x in chunk.sharded_state_dict(prefix=prefix).items() if not _is_extra(key)}
            for i, chunk in enumerate(self.chunks)
        }

    def load(self, tree: dict[str, Any], prefix: str = "") -> None:
        """Copy what was read for `sharded` into the weights."""
        for i, chunk in enumerate(self.chunks):
            read = {key.removeprefix(prefix): entry for key, entry in tree[str(i)].items()}
            problems = chunk.load_state_dict(read, strict=False)
            assert not problems.unexpected_keys and all(map(_is_extra, problems.missing_keys)), problems


def _is_extra(key: str) -> bool:
    """What recipe Transformer Engine used. Block scaling has no state; Megatron's own linears have none either."""
    return key.endswith("._extra_state")


def _shards(state: dict[str, Any]) -> dict[torch.Tensor, Shard]:
    """Tensor of the model -> its description."""
    return {
        entry.data: entry
        for chunk in state.values()
        for entry in chunk.values()
        if isinstance(getattr(entry, "data", None), torch.Tensor)
    }


def _snapshot_shards(model: Saved, snapshot: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The snapshot's tensors, sharded as the parameters that they were copied from."""
    with lent_weights(model.local, snapshot):
        state = model.sharded("reference.")
        for entry in _shards(state).values():
            entry.data = entry.data.detach()  # what was lent, not the parameter that is restored at the exit
    return state


def save(folder: Path, model: Saved, optimizer: MegatronOptimizer, snapshot: dict[str, torch.Tensor] | None) -> None:
    """Write into an existing empty folder. Collective.

    Raises:
        RuntimeError: a write failed (disk full, quota); the folder is then of no use.
    """
    step = step_count(optimizer)
    tree: dict[str, Any] = {"model": model.sharded(), "step": step}
    if step:
        tree["optimizer"] = written_shards(optimizer, _shards(tree["model"]))
    if snapshot is not None:
        tree["reference"] = _snapshot_shards(model, snapshot)
    # Megatron would start a manager process to carry results back from an asynchronous save: seconds, and an endless
    # loop in scripts without a __main__ guard. This save is synchronous: its results never leave the process.
    filesystem_async._results_queue = queue.Queue()
    try:
        dist_checkpointing.save(tree, str(folder))
    # The first is a BaseException, whose last line says what failed. PyTorch's writer of files knows only that one did.
    except (CheckpointException, OSError, RuntimeError) as error:
        reason, free = str(error).strip().splitlines()[-1], shutil.disk_usage(folder).free / 1e6
        raise RuntimeError(
            f"checkpoint: {folder} could not be written ({reason}; its disk has {free:,.1f} MB free); free some space "
            "and start the same command again: it goes on from the last whole checkpoint"
        ) from error


def load(
    folder: Path, model: Saved, optimizer: MegatronOptimizer, snapshot: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """Read into the model, the optimizer and the tensors of `snapshot`; returns the latter. Collective."""
    step = dist_checkpointing.load_common_state_dict(str(folder))["step"]  # by weights_only
    tree: dict[str, Any] = {"model": model.sharded()}
    if step:
        tree["optimizer"] = wanted_shards(optimizer, _shards(tree["model"]))
    if snapshot is not None:
        tree["reference"] = _snapshot_shards(model, snapshot)
    # Not validated: together the ranks read less than all where a distributed optimizer leaves parts to each.
    with only_plain(folder):
        tree = dist_checkpointing.load(tree, str(folder), validate_access_integrity=False)
    model.load(tree["model"])
    if snapshot is not None:
        with lent_weights(model.local, snapshot):
            model.load(tree["reference"], "reference.")
    optimizer.reload_model_params()  # the master weights, where the checkpoint has no better ones
    if step:
        restore(optimizer, tree["optimizer"], step)
    return snapshot


def load_weights(folder: Path, model: Saved) -> None:
    """Read the model alone. Collective."""
    tree = {"model": model.sharded()}
    with only_plain(folder):
        read = dist_checkpointing.load(tree, str(folder), validate_access_integrity=False)
    model.load(read["model"])
