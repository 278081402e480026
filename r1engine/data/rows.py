"""Rows of data files, JSON or Parquet, one after the other, each with its place for error messages."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from r1engine.config.data_files import REQUIRED, data_files, is_data_file

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 4096  # of a .parquet file, in memory at once

# Columns of other projects' files, and the setting that reads them; the first that fits is told.
SETTINGS = (
    (("prompt", "reward_model"), "data.columns={question: prompt, answer: reward_model.ground_truth}"),
    (("problem", "answer"), "data.columns.question=problem"),
    (("problem", "solution"), "data.columns={question: problem, answer: solution} data.answer_form=boxed"),
    (("problem",), "data.columns.question=problem"),
    (("prompt", "solution"), "data.columns={question: prompt, answer: solution}"),
    (("prompt",), "data.columns.question=prompt"),
    (
        ("conversations",),
        "data.columns.messages=conversations, of questions data.columns.question=conversations",
    ),
    (("instruction", "output"), "data.columns={question: instruction, completion: output}"),
    (("messages",), "data.columns.question=messages"),
    (("instruction",), "data.columns.question=instruction"),
    (("query",), "data.columns.question=query"),
)


class SpelledFloat(float):
    """A number of a JSON file, which prints as it stands there: 0.10, 1e3, 0.00001."""

    _text: str

    def __new__(cls, text: str) -> SpelledFloat:
        self = super().__new__(cls, text)
        self._text = text
        return self

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


class Row(NamedTuple):
    """One row. A field that is null is not in it: to both formats null means absent."""

    path: Path
    number: int  # of the line, or of the row of a .parquet file, from 1
    fields: dict[str, Any]
    columns: list[str]  # every name that is there, sorted

    @property
    def place(self) -> str:
        """ "train.jsonl:7", for error messages."""
        return place(self.path, self.number)


def place(path: Path, number: int) -> str:
    """Where a row stands."""
    return f"{path}:{number}" if ".jsonl" in path.suffixes else f"{path}: row {number}"


def read_rows(
    path: Path, fields: tuple[str, ...], *, one_of: tuple[str, ...] | None = None, every_column: bool = False
) -> Iterator[Row]:
    """The rows of a data file, in file order, or of all files of a folder or pattern, see `data_files`.

    Args:
        path:    of the file.
        fields:  columns that are read of a .parquet file; a line of a .jsonl file is
            given with all it has.
        one_of: columns of which a .parquet file must have one; None: the first of `fields`.
        every_column: of a .parquet file, too.

    Raises:
        ValueError: the file is missing, empty, damaged or of another kind, or a line is no object in JSON; the row is
            named.
    """
    for file in data_files(Path(path)):
        yield from _rows_of(file, fields, fields[:1] if one_of is None else one_of, every_column)


def _rows_of(path: Path, fields: tuple[str, ...], one_of: tuple[str, ...], every_column: bool) -> Iterator[Row]:
    if not is_data_file(path):
        raise ValueError(f"{path}: found the extension '{path.suffix}', required {REQUIRED}")
    try:
        path.open("rb").close()
    except OSError as error:
        found = (
            "no such file" if isinstance(error, FileNotFoundError) else f"a file that cannot be read: {error.strerror}"
        )
        raise ValueError(f"{path}: found {found}, required a data file") from error
    number = 0
    is_parquet = path.suffix == ".parquet"
    for row in _parquet_rows(path, fields, one_of, every_column) if is_parquet else _json_rows(path, fields):
        number = row.number
        yield row
    if not number:
        raise ValueError(f"{path}: found no rows, required at least one")


def missing(field: str, columns: list[str]) -> str:
    """What to say where a required field is not there, or is null."""
    if field in columns:
        return f"{field} is null, required is a value"
    advice = next((text for names, text in SETTINGS if set(names) <= set(columns)), "")
    return f"found no field '{field}', only {columns}" + (
        f" (a run reads these with {advice})" if advice and field == "question" else ""
    )


def utf8(data: bytes, path: Path, line: int = 1) -> str:
    """The text of a file, or of what begins with this line of it, without the mark of its byte order.

    Raises:
        ValueError: it is in another encoding; the line is named.
    """
    if line == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}:1: found UTF-16, required UTF-8; save it again as UTF-8")
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: found the byte 0x{data[error.start]:02x}, which is no UTF-8; save the file as UTF-8"
        ) from None


def parse_line(line: str | bytes, where: str) -> Any:
    """The JSON value of a line. The numbers of an object keep their spelling.

    Raises:
        ValueError: it is not JSON; the place is named.
    """
    try:
        row = json.loads(line)
        if isinstance(row, dict) and any(type(value) is float for value in row.values()):
            spelled = json.loads(line, parse_float=SpelledFloat)  # inside of other values nobody asks for it
            row |= {name: value for name, value in spelled.items() if isinstance(value, SpelledFloat)}
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at character {error.pos + 1} of the line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    return row


def _json_rows(path: Path, fields: tuple[str, ...]) -> Iterator[Row]:
    try:
        with _opened(path) as file:
            objects = _lines(file, path) if ".jsonl" in path.suffixes else _list(file, path)
            for number, found in objects:
                if not isinstance(found, dict):
                    raise ValueError(
                        f"{place(path, number)}: found {type(found).__name__}, required an object with "
                        f"`{fields[0]}` and `{fields[1]}`"
                    )
                present = {name: value for name, value in found.items() if value is not None}
                yield Row(path, number, present, sorted(found))
    except (OSError, EOFError) as error:  # of the compression
        raise ValueError(f"{path}: cannot be read: {error}; copy it again") from error


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, parse_line(utf8(line, path, number), place(path, number))


def _list(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a list; of an object that holds one list alone, those of the list."""
    text = utf8(file.read(), path)
    try:
        found = json.loads(text, parse_float=SpelledFloat)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else []
    entries = lists[0] if len(lists) == 1 else found
    if not isinstance(entries, list):
        raise ValueError(f"{path}: found {type(found).__name__}, required a list of objects, or lines as .jsonl")
    return enumerate(entries, start=1)


def _parquet_rows(path: Path, fields: tuple[str, ...], one_of: tuple[str, ...], every_column: bool) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    columns = sorted(file.schema_arrow.names)
    if one_of and not set(one_of) & set(columns):
        raise ValueError(f"{path}: {missing(one_of[0], columns)}")
    wanted = columns if every_column else [name for name in fields if name in columns]
    plain = {name: _plain(file.schema_arrow.field(name).type) for name in wanted}
    number = 0
    with file:
        batches = file.iter_batches(BATCH_ROWS, columns=list(plain))
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path}: the rows behind {number} cannot be read: {error}; copy it again") from error
            if batch is None:
                return
            for values in _values(batch, path, number):
                number += 1
                present = {name: plain[name](value) for name, value in values.items() if value is not None}
                yield Row(path, number, present, columns)


def _values(batch: pyarrow.RecordBatch, path: Path, before: int) -> Iterator[dict[str, Any]]:
    """The rows of a batch; a value that is none, such as bytes that are no text, is named."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, ArithmeticError):
        for index in range(len(batch)):  # which one?
            try:
                batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError, ArithmeticError) as error:
                raise ValueError(f"{place(path, before + index + 1)}: a value cannot be read: {error}") from error
        raise


def _plain(kind: pyarrow.DataType) -> Callable[[Any], Any]:
    """Makes of a column's value what a line of a .jsonl file holds: a number is the shortest one of the column's own
    width, without an exponent; 0.1 as float32 is 0.1, not 0.10000000149011612."""
    import numpy as np
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if pyarrow.types.is_floating(kind):
        width = np.dtype(kind.to_pandas_dtype()).type

        def spelled(value: float) -> float:
            return SpelledFloat(np.format_float_positional(width(value), trim="0")) if np.isfinite(value) else value

        return spelled
    if pyarrow.types.is_decimal(kind):
        return lambda value: SpelledFloat(f"{Decimal(value):f}")
    return lambda value: value
