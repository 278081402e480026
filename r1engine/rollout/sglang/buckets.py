"""Weights on their way: cut into buckets of bounded size, and written in the form that SGLang reads."""

from __future__ import annotations

import base64
import io
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

# SGLang rebuilds something from all the tensors of a latent-attention block when it gets one of them, and drops an
# orphan of its fused pairs without a word: the tensors of a block never part.
ATTENTION_BLOCK = re.compile(r"(.*\.self_attn)\.")


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together."""

    names: list[str]
    tensors: list[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def buckets(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[Bucket]:
    """Copies of the tensors, in order, at most `limit` bytes at a time (a single larger tensor travels alone).

    Tensors that SGLang needs in one call stay in one bucket, even past the limit.

    Args:
        weights: (Hugging Face name, tensor that is valid until the next one is asked for).
        limit:   bytes of a bucket.
    """
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    size, last_block = 0, None
    for name, tensor in weights:
        block = match[1] if (match := ATTENTION_BLOCK.match(name)) else None
        need = tensor.numel() * tensor.element_size()
        if names and size + need > limit and (block is None or block != last_block):
            yield Bucket(names, tensors)
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor.detach().clone())
        size, last_block = size + need, block
    if names:
        yield Bucket(names, tensors)


def flatten(bucket: Bucket) -> torch.Tensor:
    """[bytes] uint8: the tensors end to end, as SGLang's flattened bucket holds them."""
    return torch.cat([t.contiguous().flatten().view(torch.uint8) for t in bucket.tensors])


def order_by_alignment(bucket: Bucket) -> Bucket:
    """The same tensors, those with wider elements first, so that every tensor starts on a multiple of its element."""
    order = sorted(range(len(bucket.names)), key=lambda i: -bucket.tensors[i].element_size())
    return Bucket([bucket.names[i] for i in order], [bucket.tensors[i] for i in order])


class _Metadata:
    """Stands for SGLang's FlattenedTensorMetadata while it is pickled; SGLang is not installed here."""

    def __init__(self, name: str, tensor: torch.Tensor, start: int) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        self.name, self.shape, self.dtype = name, tensor.shape, tensor.dtype
        self.start_idx, self.end_idx, self.numel = start, start + num_bytes, num_bytes


_PythonPickler: Any = pickle._Pickler  # what it has is not declared anywhere


class _Pickler(_PythonPickler):
    """Names _Metadata as the class that the server knows, and tensors as multiprocessing does on CUDA."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is _Metadata:
            self.write(pickle.GLOBAL + b"sglang.srt.weight_sync.tensor_bucket\nFlattenedTensorMetadata\n")
            self.memoize(obj)
            return
        super().save_global(obj, name)

    # The C pickler looks functions and classes up here as well.
    dispatch = _PythonPickler.dispatch | {type: save_global, type(lambda: None): save_global}


_DEVICE = 6  # which argument of `rebuild_cuda_tensor` is the device


def _ipc_handle(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """How a tensor on a GPU is made again elsewhere: as multiprocessing does it, but the GPU is named by its UUID.

    The server's index of the same GPU is another one; SGLang's `rebuild_cuda_tensor` takes either.
    """
    from torch.multiprocessing import reductions

    rebuild, arguments = reductions.reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
    return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


def payload(bucket: Bucket, flat: torch.Tensor, starts: Sequence[int] | None = None) -> str:
    """The bucket as SGLang's `serialized_named_tensors` takes it: base64 of a pickled flattened bucket.

    Args:
        bucket: of `order_by_alignment`.
        flat:   of `flatten`. On a CPU its bytes travel inside. Of one in shared memory the pickle holds the name, of
                one on a GPU a CUDA IPC handle and the GPU's UUID, and `flat` must live until the server has answered.
        starts: byte of `flat` at which each tensor begins; None: end to end.
    """
    if starts is None:
        ends = list(accumulate(t.numel() * t.element_size() for t in bucket.tensors))
        starts = [0, *ends][: len(ends)]
    metadata = [_Metadata(n, t, start) for n, t, start in zip(bucket.names, bucket.tensors, starts, strict=True)]
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=4)
    if flat.is_cuda or flat.is_shared():
        from multiprocessing.reduction import ForkingPickler

        from torch.multiprocessing import reductions

        reductions.init_reductions()  # CUDA IPC, or the name of the shared memory
        table = dict(ForkingPickler(io.BytesIO()).dispatch_table)
        pickler.dispatch_table = table | {torch.Tensor: _ipc_handle} if flat.is_cuda else table
    pickler.dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getbuffer()).decode("ascii")
