"""Files as owners of benchmarks write them, and rows of the table of benchmarks that read and grade them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Marked, Reply
from r1engine.evaluation.benchmarks import benchmark_of


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, *rows: list, encoding: str = "utf-8") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def loaded(name: str, path: Path, **settings):
    row = benchmark_of(name, "")
    return row, row.load(BenchmarkSettings(file=path, **settings))


def mark_of(row, item, reply: str, sample: int = 0) -> Marked:
    mark = row.grade(item, sample, Reply(reply, "stop"))
    assert isinstance(mark, Marked)
    return mark
