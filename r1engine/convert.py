"""A Hugging Face folder in another number format."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from r1engine.hf.architecture import read_architecture
from r1engine.hf.export import is_unfinished
from r1engine.hf.folder import Folder
from r1engine.hf.formats import Precision, begin_export, finish_export, put, store
from r1engine.hf.tensors import hf_shapes


def convert(source: Path, target: Path, precision: Precision) -> None:
    """Write `source` into `target` in `precision`, one tensor in memory at a time.

    A second run after an interruption keeps the files that are whole, if the source is the same.

    Raises:
        ValueError: `source` is no whole model folder of a supported family, or is `target`; `target` holds anything but
            an interrupted run.
        RuntimeError: the disk is full.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"convert: source and target are both {source}, required two folders")
    if target.exists() and not is_unfinished(target):
        found = sorted(file.name for file in target.iterdir()) if target.is_dir() else ["no folder, but a file"]
        if found:
            raise ValueError(
                f"convert: {target} holds {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}; required is an "
                "empty folder, a new one, or one that an interrupted convert has begun"
            )
    arch = read_architecture(source)
    folder = Folder(source, arch)
    export, done = begin_export(folder, arch, target, precision, {"source": _identity(source)})
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("convert", *columns, transient=True) as progress:
        bar = progress.add_task("convert", total=export.total_bytes)

        def advance(num_bytes: int) -> None:
            progress.advance(bar, num_bytes)

        for name in hf_shapes(arch):
            if name not in done:
                put(export, store(name, folder.read(name), precision), advance)
        finish_export(export, folder, precision, advance)


def _identity(source: Path) -> str:
    """Changes with the source's files: their names, sizes and times."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.glob("*.safetensors"))
    return hashlib.sha256(repr(files).encode()).hexdigest()
