"""Writes a Hugging Face folder tensor by tensor, in any order, and goes on where an interrupted export stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1engine.hf.headers import INDEX

FILE_BYTES = 5 * 2**30  # size of an exported safetensors file
UNFINISHED = "export.json"  # what is being exported; there while the export is not complete
HASHES = "SHA256SUMS"  # of the finished safetensors files, at the end of all files; in the form of sha256sum
CARD = "README.md"
# What a folder holds beside weights: configuration, tokenizer, chat template, and code that auto_map names.
CARRIED = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*tiktoken*", "chat_template.*", "additional_chat_templates/*.jinja", "*.py",
    "rated_template.txt",
    "step_scores.json",
)  # fmt: skip
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class Stored:
    """What a tensor is in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Export:
    """A folder being written. Which tensor goes to which byte of which file is fixed at the start, from names, shapes
    and dtypes alone, so that the files do not depend on the order in which the tensors come, nor on who made them."""

    def __init__(self, target: Path, stored: dict[str, Stored], source: Path, *, identity: dict[str, Any]) -> None:
        """Prepare `target`; the files that an interrupted export of the same `identity` finished are kept.

        Args:
            target:   folder to write; weights of an earlier export in it are removed.
            stored:   every tensor that will come, in the order of the files.
            source:   folder whose configuration, tokenizer and chat template are copied.
            identity: what is exported, as JSON; another one starts from nothing.

        Raises:
            RuntimeError: `target` has weights that no export wrote, or the disk has less room than the files need.
        """
        self.target, self._stored, self._source = target, stored, source
        self._files = _plan(stored)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        target.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign()
        layout = json.dumps([(n, s.shape, str(s.dtype)) for n, s in stored.items()])
        wanted = {"identity": identity, "tensors": hashlib.sha256(layout.encode()).hexdigest()}
        finished = self._finished() if _read(target / UNFINISHED) == wanted else {}
        for file in [*target.glob("*.safetensors"), *target.glob(".*.partial")]:
            if file.name not in finished:
                file.unlink()
        (target / INDEX).unlink(missing_ok=True)
        _write(target / UNFINISHED, json.dumps(wanted, indent=1))
        self._hashes = finished
        self._write_hashes()
        self._check_space()
        self._open: dict[str, _File] = {}

    @property
    def done(self) -> set[str]:
        """Names of the tensors that need not come again."""
        return {name for file in self._hashes for name in self._files[file]}

    @property
    def total_bytes(self) -> int:
        """Of all tensors, those that are done included."""
        return sum(s.num_bytes for s in self._stored.values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor of the stored shape and dtype in its place; a file is closed and named when it is whole."""
        found, wanted = Stored(tuple(tensor.shape), tensor.dtype), self._stored[name]
        assert found == wanted, (name, found, wanted)
        file = self._file_of[name]
        if file in self._hashes:
            return
        if file not in self._open:
            self._open[file] = _File(self.target / f".{file}.partial", {n: self._stored[n] for n in self._files[file]})
        part = self._open[file]
        part.write(name, tensor)
        if part.is_whole:
            self._hashes[file] = part.close(self.target / file)
            del self._open[file]
            self._write_hashes()

    def finish(self, changed: dict[str, dict[str, Any]] | None = None, card: str | None = None) -> None:
        """Write the index, copy what belongs to the model from the source, and mark the folder as complete.

        Args:
            changed: what JSON files shall hold that are not to be the source's, by their names.
            card:    text of the model card; None: there is none.
        """
        if missing := sorted(self._stored.keys() - self.done):
            raise ValueError(f"export: {len(missing)} tensors did not come ({', '.join(missing[:5])})")
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._file_of}
            _write(self.target / INDEX, json.dumps(index, indent=1) + "\n")
        names = sorted({str(f.relative_to(self._source)) for form in CARRIED for f in self._source.glob(form)})
        for name in names if self._source != self.target else ():
            (self.target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self._source / name, self.target / name)
        for name, content in (changed or {}).items():
            _write(self.target / name, json.dumps(content, indent=2) + "\n")
        if card is not None:
            _write(self.target / CARD, card)
        own = (name for name in (changed or {}) if name not in names)
        beside = [name for name in (INDEX, *names, *own, CARD) if (self.target / name).is_file()]
        self._write_hashes({name: _sha256(self.target / name) for name in beside})
        (self.target / UNFINISHED).unlink()

    def _refuse_foreign(self) -> None:
        """Weights that somebody else put there are not removed."""
        written = set(_listed_hashes(self.target))
        if is_unfinished(self.target):
            written |= self._files.keys()  # the last one may not be listed yet
        foreign = sorted({file.name for file in self.target.glob("*.safetensors")} - written)
        if foreign:
            raise RuntimeError(
                f"export: {self.target} holds {', '.join(foreign[:5])}, which no export wrote; required is a folder "
                "without other weights"
            )

    def _finished(self) -> dict[str, str]:
        """File -> SHA-256 of the files that are whole and unchanged."""
        return {
            name: digest
            for name, digest in _listed_hashes(self.target).items()
            if name in self._files and (self.target / name).is_file() and _sha256(self.target / name) == digest
        }

    def _write_hashes(self, beside: dict[str, str] | None = None) -> None:
        hashes = {name: self._hashes[name] for name in self._files if name in self._hashes} | (beside or {})
        lines = [f"{digest}  {name}\n" for name, digest in hashes.items()]
        _write(self.target / HASHES, "".join(lines))

    def _check_space(self) -> None:
        needed = self.total_bytes - sum(self._stored[name].num_bytes for name in self.done)
        free = shutil.disk_usage(self.target).free
        if free < needed:
            raise RuntimeError(
                f"export: {self.target} has {free / 1e9:.2f} GB free, but the files need {needed / 1e9:.2f} GB"
            )


def is_unfinished(folder: Path) -> bool:
    """Whether an export into this folder was begun and did not come to its end."""
    begun = _read(folder / UNFINISHED)
    return isinstance(begun, dict) and begun.keys() == {"identity", "tensors"}


def _listed_hashes(folder: Path) -> dict[str, str]:
    """File -> SHA-256, as an export noted them in this folder."""
    if not (folder / HASHES).is_file():
        return {}
    return {name: digest for digest, _, name in (x.partition("  ") for x in (folder / HASHES).read_text().splitlines())}


class _File:
    """One safetensors file: an 8-byte length, a JSON header, and the tensors at the offsets it names."""

    def __init__(self, path: Path, stored: dict[str, Stored]) -> None:
        # Wide types first, so that every tensor begins at a multiple of its item size.
        order = sorted(stored, key=lambda name: -stored[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in order:
            end = offset + stored[name].num_bytes
            entry = {"dtype": NAMES[stored[name].dtype], "shape": stored[name].shape, "data_offsets": (offset, end)}
            header[name], offset = entry, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in order}
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._put(len(text).to_bytes(8, "little") + text, 0)

    @property
    def is_whole(self) -> bool:
        return not self._offsets

    def write(self, name: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        self._put(values.data, self._offsets.pop(name))

    def close(self, final: Path) -> str:
        """Flush, give the file its name, and return its SHA-256."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        os.replace(self._path, final)
        return _sha256(final)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            try:
                count = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise RuntimeError(
                    f"export: cannot write {self._path}: {error.strerror}; the files that are whole are kept, and the "
                    "same command goes on from them"
                ) from error
            view, offset = view[count:], offset + count


def _plan(stored: dict[str, Stored]) -> dict[str, list[str]]:
    """File -> its tensors, filled in order up to FILE_BYTES."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in stored.items():
        if size and size + tensor.num_bytes > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
