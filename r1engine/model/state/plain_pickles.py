"""Reading a Megatron checkpoint without running what somebody has put into it.

PyTorch reads `.metadata` by a plain pickle.load, and what this says is no tensor by torch.load without weights_only;
both run any function that the file names. Megatron reads common.pt and tensors by weights_only itself.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load obeys it whatever its caller says
_CHECKPOINT = "torch.distributed.checkpoint"
_NEEDED = {  # module -> names
    f"{_CHECKPOINT}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    f"{_CHECKPOINT}.planner": ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Finds what the description of a checkpoint is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NEEDED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@contextmanager
def only_plain(folder: Path) -> Iterator[None]:
    """Inside, the model's part of a checkpoint can be read: its `.metadata` is found plain, the rest is held to be.

    Raises:
        ValueError: `.metadata` is no description of a checkpoint, or names what none has.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            _MetadataUnpickler(file).load()
    except Exception as error:  # a broken pickle raises whatever it comes to
        raise ValueError(
            f"checkpoint: {path}: found no plain description of a checkpoint ({error}), required one as it was written"
        ) from error
    before = os.environ.get(_ONLY_WEIGHTS)
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONLY_WEIGHTS]
        else:
            os.environ[_ONLY_WEIGHTS] = before
