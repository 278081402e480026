"""The disk route: what changed since the last refresh, as safetensors files in a folder that the servers see."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from r1engine.rollout.sglang.buckets import ATTENTION_BLOCK, buckets
from r1engine.rollout.sglang.digest import digest


class WeightFolder:
    """A Hugging Face folder for SGLang, with all tensors or with those that are not what they were."""

    def __init__(self, folder: Path, source: Path) -> None:
        """
        Args:
            folder: to write.
            source: the model's folder; config and tokenizer are copied from it.
        """
        self.folder, self._source = folder, source
        self._last: dict[str, str] = {}  # digest of each tensor in the last refresh

    def clear(self) -> None:
        """No weights, and the model's other files beside them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("*.safetensors"):
            file.unlink()
        for file in self._source.iterdir():
            if file.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in file.name:
                shutil.copyfile(file, self.folder / file.name)

    def write(self, weights: Iterable[tuple[str, torch.Tensor]], *, limit: int, everything: bool, part: int = 0) -> int:
        """Add tensors to the folder; returns their bytes.

        Args:
            weights:    this rank's share, the same names each time, blocks of attention in one piece; consumed to the
                        end.
            limit:      bytes of a file, and with it of the memory needed.
            everything: also what did not change.
            part:       number of the share.
        """
        num_bytes = 0
        for number, bucket in enumerate(buckets(self._changed(weights, everything), limit)):
            tensors = {n: t.cpu().contiguous() for n, t in zip(bucket.names, bucket.tensors, strict=True)}
            save_file(tensors, self.folder / f"weights-{part:05}-{number:05}.safetensors", {"format": "pt"})
            num_bytes += bucket.num_bytes
        return num_bytes

    def _changed(self, weights: Iterable[tuple[str, torch.Tensor]], everything: bool) -> Iterator:
        """Those that are not what they were; the tensors of an attention block all or none."""
        block: list[tuple[str, torch.Tensor]] = []
        name_of_block = ""
        is_changed = False
        for name, tensor in weights:
            match = ATTENTION_BLOCK.match(name)
            if block and (match is None or match[1] != name_of_block):
                yield from block if is_changed else ()
                block, is_changed = [], False
            hashed = digest(tensor)
            is_new = everything or self._last.get(name) != hashed
            self._last[name] = hashed
            if match is None:
                if is_new:
                    yield name, tensor
                continue
            name_of_block = match[1]
            block.append((name, tensor.detach().clone()))
            is_changed = is_changed or is_new
        yield from block if is_changed else ()
