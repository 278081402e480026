"""Where the files of a data set are: one file, a folder of them, a pattern, or a data set of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# How a file's rows are written. A .json file holds one list of objects.
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
REQUIRED = "a .jsonl, .json or .parquet file (.jsonl and .json may be .gz or .zst), or a folder or pattern of them"
HUB = "hf:"  # before the name of a data set or model of the Hub


def is_on_hub(path: Path) -> bool:
    """Whether the path names something of the Hugging Face Hub."""
    return str(path).startswith(HUB)


def is_data_file(path: Path) -> bool:
    """Whether the name is one of a data file."""
    return path.name.endswith(SUFFIXES)


def is_pattern(path: Path) -> bool:
    """Whether the path stands for several files."""
    return any(sign in str(path) for sign in "*?[") and not path.exists()


def is_there(path: Path) -> bool:
    """Whether a file or folder is there, or a file that a pattern stands for."""
    if not is_pattern(path):
        return path.exists()
    try:
        return bool(data_files(path))
    except ValueError:
        return False


def missing(paths: Mapping[str, Path]) -> list[str]:
    """Of the paths of keys those that are not there: "key: ...", one line each."""
    gone = [(key, path) for key, path in paths.items() if not is_there(path)]
    return [f"{key}: found no {path}, required a file or a folder" for key, path in gone]


def data_files(path: Path) -> list[Path]:
    """The files of a data set, sorted; a folder is searched with all below it.

    Raises:
        ValueError: there are none.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if is_data_file(file) and file.is_file())
    elif is_pattern(path):
        anchor = Path(path.anchor)
        found = sorted(file for file in anchor.glob(str(path.relative_to(anchor))) if is_data_file(file))
    else:
        return [path]
    if not found:
        raise ValueError(f"{path}: found no data files, required {REQUIRED}")
    return found
