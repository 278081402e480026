"""The trained weights as a Hugging Face folder: gathered from all ranks, written by the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from r1engine.hf.export import Export
from r1engine.hf.folder import Folder
from r1engine.hf.formats import Precision, begin_export, finish_export, put, store
from r1engine.hf.tensors import mtp_copies, mtp_shapes
from r1engine.model.state.sharded_weights import ShardedWeights


def write_folder(
    weights: ShardedWeights,
    source: Folder,
    target: Path,
    precision: Precision,
    identity: dict[str, Any] | None,
    on_bytes: Callable[[int], None] | None,
    card: str | None,
) -> None:
    """Write `target`. Collective; the arguments are those of `Policy.export`, and `source` is the policy's folder."""
    export: Export | None = None

    def begin() -> set[str]:
        nonlocal export
        export, done = begin_export(source, weights.model, target, precision, identity)
        return done

    for name, tensor in _exported(weights, weights.world.from_first(begin)):
        if export is not None:
            put(export, store(name, tensor, precision), on_bytes)
    if export is not None:
        copies_mtp = weights.model.head == "tokens" and not weights.has_mtp
        finish_export(export, source, precision, on_bytes, head=weights.model.head, copies_mtp=copies_mtp, card=card)


@torch.no_grad()
def _exported(weights: ShardedWeights, done: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a folder holds, but for the tensors in `done` and for MTP modules that are not trained."""
    if not weights.has_mtp:
        yield from weights.full({*done, *mtp_shapes(weights.model)})
        return
    copies = mtp_copies(weights.model)
    needed = {name for name, others in copies.items() if not {name, *others} <= {*done}}
    for name, tensor in weights.full({*done} - needed):
        for stored_name in (name, *copies.get(name, ())):
            yield stored_name, tensor
