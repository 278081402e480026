"""What of a training file stands in the benchmarks of a suite (v2 of the paper, D.1). No torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from r1engine.config.evaluation import Suite
from r1engine.data.contamination import NGRAM, EvaluationIndex, EvaluationText
from r1engine.data.rows import Row, read_rows
from r1engine.evaluation.entries import load_entries

SHOWN = 10  # overlaps that are printed
FIELDS = ("question", "answer", "solution", "messages")


def compare_with_training(train: Path, suite: Suite, write: Path | None) -> list[str]:
    """Lines for the user: how many rows of a training file share an n-gram with a benchmark, and the first of them.

    Args:
        train: .jsonl or .parquet file.
        suite: of the benchmarks; their questions, and reference answers of ten words or more, are looked for.
        write: .jsonl file for the other rows, in order; None: none is written.

    Raises:
        ConfigError, ValueError: a file cannot be read.
    """
    entries = load_entries(suite.benchmarks, has_judge=True)
    texts = [
        EvaluationText(text, f"{entry.name}: {item.id}", is_question=text is item.question.text)
        for entry in entries
        for item in entry.items
        for text in (item.question.text, item.question.answer)
        if text.strip()
    ]
    index = EvaluationIndex(texts)
    counts: Counter[str] = Counter()
    rows, shown, kept = 0, list[str](), list[Row]()
    for row in read_rows(train, FIELDS, one_of=("question", "messages"), every_column=True):
        rows += 1
        question, others = _texts(row)
        if (overlap := index.find([question], others)) is None:
            kept.append(row)
            continue
        counts[overlap.place.partition(":")[0]] += 1
        if len(shown) < SHOWN:
            shown.append(f"  {row.place} shares with {overlap}")
    if write is not None:
        _write(write, kept)
    lines = [f"{rows:,} rows, {len(texts):,} texts of benchmarks, {NGRAM}-grams: {rows - len(kept):,} rows overlap"]
    lines += [f"  {name}: {count:,}" for name, count in counts.most_common()] + shown
    return lines + ([f"written: {write} ({len(kept):,} rows)"] if write is not None else [])


def _texts(row: Row) -> tuple[str, list[str]]:
    fields = row.fields
    messages = fields.get("messages")
    if isinstance(messages, list):
        said = [str(message.get("content", "")) for message in messages if isinstance(message, dict)]
        return (said[0] if said else ""), said[1:]
    return str(fields.get("question", "")), [str(fields[name]) for name in ("answer", "solution") if name in fields]


def _write(path: Path, rows: list[Row]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row.fields) + "\n")
    os.replace(temporary, path)
