"""The owners' files of benchmarks: JSON, CSV, TSV and Parquet, plain, in gzip or in a zip. No torch.

Text is UTF-8, with or without a mark of its byte order. What is otherwise is refused with file and line.
"""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import io
import json
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1engine.data.rows import utf8

csv.field_size_limit(2**30)


class FileRow(NamedTuple):
    """A row of an owner's file."""

    place: str  # "gpqa.csv:7", for messages
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """A field that must be a text or a number, and not blank.

        Raises:
            ValueError: it is missing, null, blank or of another kind.
        """
        value = self.fields.get(name)
        if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
            shown = "null" if value is None and name in self.fields else "missing" if value is None else repr(value)
            raise ValueError(f"{self.place}: {name} is {shown:.80}, required a text or a number")
        if not str(value).strip():
            raise ValueError(f"{self.place}: {name} is blank, required a text or a number")
        return str(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A field that must be a number; `default` where it is missing.

        Raises:
            ValueError: it is none.
        """
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self.place}: {name} is {value!r:.80}, required a number")
        return float(value)

    def any_of(self, *names: str) -> str:
        """`text` of the first of these fields that is there; copies of a file name them differently."""
        return self.text(next((name for name in names if name in self.fields), names[0]))

    def items(self, name: str) -> list[Any]:
        """A field that must be a list of at least one item.

        Raises:
            ValueError: it is none.
        """
        value = self.fields.get(name)
        if not isinstance(value, list) or not value:
            raise ValueError(f"{self.place}: {name} is {json.dumps(value, default=str)[:80]}, required a list")
        return value

    def texts(self, name: str, least: int = 2) -> list[str]:
        """A field that must be a list of at least `least` texts, also written as Python or JSON writes it.

        Raises:
            ValueError: it is none.
        """
        value = self.fields.get(name)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                value = self.fields[name]
        if not isinstance(value, list) or len(value) < least or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{self.place}: {name} is {value!r:.80}, required a list of at least {least} texts")
        return value


def digest(*texts: str) -> str:
    """The id of a question whose owners give it none."""
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def unique(ids: Iterable[str]) -> list[str]:
    """The ids, with a number behind one that occurs again."""
    seen, found = Counter[str](), []
    for one in ids:
        seen[one] += 1
        found.append(one if seen[one] == 1 else f"{one}-{seen[one]}")
    return found


def object_rows(path: Path, required: Sequence[str]) -> list[FileRow]:
    """All rows of `each_object`."""
    return list(each_object(path, required))


def each_object(path: Path, required: Sequence[str]) -> Iterator[FileRow]:
    """The objects of lines of JSON (.jsonl, .jsonl.gz), of a .json file that is one list or such lines, or the rows of
    a .parquet file, one after the other: a file of LiveCodeBench has more than a gigabyte.

    Args:
        path:     of the file.
        required: fields that the first row must have, else it is another file; "a|b": one of them.

    Raises:
        ValueError: the file is missing, empty or another one, or a line is no object; file and line are named.
    """
    if path.suffix == ".parquet":
        rows: Iterator[FileRow] = iter(_parquet(path))
    else:
        rows = (_object(place, value) for place, value in _values(path))
    first = next(rows, None)
    _check_fields(path, first, required)
    assert first is not None
    yield first
    yield from rows


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of the one list that a .json file is, else the lines: owners name files of lines .json, too."""
    if path.suffix == ".json" and (text := _text(path)).lstrip().startswith("["):
        for number, value in enumerate(_json(text, f"{path}"), 1):
            yield f"{path}: item {number}", value
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _object(place: str, value: Any) -> FileRow:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: found {type(value).__name__}, required an object")
    return FileRow(place, value)


def read_json(path: Path) -> Any:
    """What a .json file holds.

    Raises:
        ValueError: the file is missing or no JSON.
    """
    return _json(_text(path), str(path))


def one_object(path: Path) -> dict[str, Any]:
    """The object that a .json file is.

    Raises:
        ValueError: the file is missing or another one.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: found {type(found).__name__}, required an object that is not empty")
    return found


def table_rows(path: Path, required: Sequence[str], *, header: Sequence[str] | None = None) -> list[FileRow]:
    """The rows of a .csv or .tsv file. A place is the line on which a row ends.

    Args:
        path:     of the file.
        required: columns that must be there.
        header:   names of the columns of a file that does not name them.

    Raises:
        ValueError: the file is missing, empty or another one, or a row has another number of columns.
    """
    return _checked(
        path, list(_parsed(_text(path), str(path), "\t" if path.suffix == ".tsv" else ",", header)), required
    )


def zipped_tables(
    path: Path, ending: str, required: Sequence[str], *, header: Sequence[str] | None = None, password: str = ""
) -> dict[str, list[FileRow]]:
    """The rows of each CSV file of a zip whose name ends so, by name; nothing is unpacked to disk.

    Raises:
        ValueError: the file is missing or no zip, the password is wrong, there is no such file in it, or as of
            `table_rows`.
    """
    found: dict[str, list[FileRow]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(ending) and not Path(name).name.startswith("."):
                    inside = Path(f"{path}/{name}")
                    text = utf8(archive.read(name, password.encode() or None), inside)
                    found[name] = _checked(inside, list(_parsed(text, str(inside), ",", header)), required)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{path}: {_why(error)}") from error
    if not found:
        raise ValueError(f"{path}: found no file *{ending} in it, required at least one")
    return found


def folder_files(path: Path, *endings: str) -> list[Path]:
    """The file, or the files of a folder whose names end so, sorted.

    Raises:
        ValueError: there are none.
    """
    if not path.exists():
        raise ValueError(f"{path}: {_why(FileNotFoundError())}")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(endings) and not file.name.startswith("."))
    if not files:
        raise ValueError(
            f"{path}: found no file {' or '.join('*' + one for one in endings)} in it, required at least one"
        )
    return files


def _parsed(text: str, path: str, delimiter: str, header: Sequence[str] | None) -> Iterator[FileRow]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = list(header) if header is not None else None
    try:
        for row in reader:
            if not row:
                continue
            if names is None:
                names = [name.strip() for name in row]
                continue
            place = f"{path}:{reader.line_num}"
            if len(row) != len(names):
                raise ValueError(f"{place}: found {len(row)} columns, required {len(names)}")
            yield FileRow(place, dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no CSV: {error}") from error


def _checked(path: Path, rows: list[FileRow], required: Sequence[str]) -> list[FileRow]:
    _check_fields(path, rows[0] if rows else None, required)
    return rows


def _check_fields(path: Path, first: FileRow | None, required: Sequence[str]) -> None:
    if first is None:
        raise ValueError(f"{path}: found no rows, required at least one")
    there = first.fields
    if missing := [name for name in required if not any(one in there for one in name.split("|"))]:
        raise ValueError(
            f"{first.place}: found the fields {', '.join(map(str, there))[:200]}, required {', '.join(required)} "
            f"(missing: {', '.join(missing)})"
        )


def _parquet(path: Path) -> list[FileRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: {_why(error)}") from error
    return [FileRow(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return utf8(gzip.decompress(data) if path.suffix == ".gz" else data, path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {_why(error)}") from error


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield utf8(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {_why(error)}") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "found no such file; it is not shipped: docs/evaluation.md says where its owners give it"
    return f"found a file that cannot be read: {error}"
