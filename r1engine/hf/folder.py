"""Reads the tensors of a local Hugging Face folder, as much of each as is asked for; FP8 is dequantized on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from r1engine.hf.architecture import Architecture, read_architecture
from r1engine.hf.headers import BLOCK, SCALE, Headers
from r1engine.hf.tensors import hf_shapes
from r1kernels import fp8_dequantize

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


class Folder:
    """The tensors of a folder: checked against the model when opened, read when asked for.

    Opening reads the headers only. Reading maps one tensor's file for the time of the call, so that a rank's host
    memory never holds more than what it asked for.
    """

    def __init__(self, path: Path, model: Architecture) -> None:
        """
        Raises:
            ValueError: see `Headers`.
        """
        self.path = path
        headers = Headers(path, model)
        self._files, self._types, self.mtp_names = headers.files, headers.types, headers.mtp_names

    def read(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        """A tensor, or the part of it that `index` takes (slices that name their ends); FP8 as float32."""
        if self._types[name] != "F8_E4M3":
            return self._raw(name, index)
        # What is asked for may begin inside a block: the block is read from its first row and column.
        begins = [part.start or 0 for part in index]
        whole = tuple(slice(begin - begin % BLOCK, part.stop) for begin, part in zip(begins, index, strict=True))
        blocks = tuple(slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in whole)
        weight, scales = self._raw(name, whole), self._raw(name + SCALE, blocks)
        wide = fp8_dequantize(weight, scales, block=(BLOCK, BLOCK), dtype=torch.float32)
        return wide[tuple(slice(begin % BLOCK, None) for begin in begins)]

    def stored(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) as the file has it; for an FP8 weight, its scales too."""
        yield name, self._raw(name)
        if self._types[name] == "F8_E4M3":
            yield name + SCALE, self._raw(name + SCALE)

    def dtype(self, name: str) -> torch.dtype:
        """What the file has."""
        return DTYPES[self._types[name]]

    def _raw(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as f:
            return (f.get_slice(name)[index] if index else f.get_tensor(name)).clone()


def weights_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full tensor) of all that generation needs of an exported folder; FP8 as float32.

    Raises:
        ValueError: see `Headers`.
    """
    arch = read_architecture(path)
    folder = Folder(path, arch)
    for name in hf_shapes(arch):
        yield name, folder.read(name)
