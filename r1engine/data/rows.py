"""Rows of a data file, JSONL or Parquet, each with its place for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(path: Path, fields: tuple[str, ...]) -> list[tuple[str, Any]]:
    """(place, row) of each row of a .jsonl or .parquet file, in file order; the place is "train.jsonl:7".

    Args:
        path:   of the file.
        fields: columns that are read of a .parquet file; a line of a .jsonl file is given as it is.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a line is not JSON; the line is named.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: found the extension '{path.suffix}', required .jsonl or .parquet")
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, required a data file")
    rows = list(_jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, fields))
    if not rows:
        raise ValueError(f"{path}: found no rows, required at least one")
    return rows


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error


def _parquet_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    wanted = [name for name in fields if name in file.schema_arrow.names]
    number = 0
    with file:
        for chunk in file.iter_batches(columns=wanted):
            for row in chunk.to_pylist():
                number += 1
                # A column holds null where JSON would leave the field out.
                yield f"{path}: row {number}", {key: value for key, value in row.items() if value is not None}
