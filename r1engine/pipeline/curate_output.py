"""The files that a stage of kind `curate` writes: rows in the order of a hash, and what was left out."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from r1engine.data.duplicates import rank
from r1engine.data.examples import BATCH, Example, read_examples, schema, table_of

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("messages", "domain", "language", "source", "method", "num_tokens", "question_sha", "edited_by")
BUCKET_TOKENS = 2**25  # of the rows that are sorted in memory at once
GROUP_ROWS = 1024  # of data.parquet


class DroppedRow(NamedTuple):
    """A row of dropped.parquet."""

    id: str
    reason: str
    detail: str
    domain: str


def write_dropped(path: Path, rows: list[DroppedRow], others: list[Path] | None = None) -> None:
    """Rows that were left out.

    Args:
        path:   to write.
        rows:   of the file.
        others: files of this function whose rows come first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.schema([(name, pa.string()) for name in DroppedRow._fields])
    with pq.ParquetWriter(path, columns, compression="zstd") as writer:
        for other in others or []:
            writer.write_table(pq.read_table(other, schema=columns))
        writer.write_table(pa.Table.from_pylist([row._asdict() for row in rows], schema=columns))
    _sync(path)


@dataclass(frozen=True)
class Buckets:
    """Files that rows are dealt to by their rank before each is sorted."""

    folder: Path
    count: int
    seed: int  # of the rank

    def path(self, number: int) -> Path:
        """Of a bucket."""
        return self.folder / f"bucket_{number:06d}"

    def of(self, number: int) -> int:
        """The bucket of a rank, below 2**64: those of a lower bucket are lower."""
        return number * self.count >> 64


def write_data(
    path: Path, parts: list[Path], is_kept: Callable[[int, Example], bool], buckets: Buckets, about: dict[str, str]
) -> None:
    """Write the rows that are kept, in the order of their rank.

    Args:
        path:    of the Parquet file to write.
        parts:   files of examples.
        is_kept: says so of (place over all parts, example), each once and in order.
        buckets: that the rows are dealt to.
        about:   goes into the metadata of the file.
    """
    import pyarrow.parquet as pq

    _deal(buckets, parts, is_kept)
    columns = _columns().with_metadata(about | {"r1engine": importlib.metadata.version("r1engine")})
    with pq.ParquetWriter(path, columns, compression="zstd", write_page_checksum=True) as writer:
        for bucket in map(buckets.path, range(buckets.count)):
            writer.write_table(_sorted(bucket).cast(columns), row_group_size=GROUP_ROWS)
            bucket.unlink()
    _sync(path)


def _columns() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema([schema().field(name) for name in COLUMNS])


def _deal(buckets: Buckets, parts: list[Path], is_kept: Callable[[int, Example], bool]) -> None:
    """Each row to the bucket of its rank."""
    import pyarrow as pa

    columns, place = _columns().append(pa.field("rank", pa.uint64())), 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pa.ipc.new_stream(buckets.path(number), columns, options=options))
            for number in range(buckets.count)
        ]
        for file in parts:
            rows = read_examples(file)
            while batch := list(islice(rows, BATCH)):
                kept = [example for i, example in enumerate(batch, place) if is_kept(i, example)]
                place += len(batch)
                ranks = [rank(buckets.seed, example.source) for example in kept]
                table = table_of(kept).select(COLUMNS).append_column("rank", pa.array(ranks, pa.uint64()))
                to = [buckets.of(number) for number in ranks]
                for bucket in sorted({*to}):
                    writers[bucket].write_table(table.take([i for i, other in enumerate(to) if other == bucket]))


def _sorted(bucket: Path) -> pyarrow.Table:
    import pyarrow as pa

    with pa.ipc.open_stream(bucket) as stream:
        return stream.read_all().sort_by([("rank", "ascending"), ("source", "ascending")]).drop_columns("rank")


def _sync(path: Path) -> None:
    """Waits until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
