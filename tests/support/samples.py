"""Folders of samples as `stage: sample` writes them, for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = pa.schema(
    [("id", pa.string()), ("question_id", pa.int64()), ("sample", pa.int16())]
    + [(name, pa.string()) for name in ("question", "prompt", "completion")]
    + [("num_tokens", pa.int32()), ("finish", pa.string()), ("verdict", pa.string()), ("reason", pa.string())]
    + [("components", pa.map_(pa.string(), pa.float64())), ("language", pa.string()), ("domain", pa.string())]
    + [("logp_mean", pa.float64()), ("answer", pa.string())]
)
THOUGHTS = "I add the ones first, then I add the tens, and so I find the sum of both numbers."


def sample(question_id: int, number: int = 0, **changed: Any) -> dict[str, Any]:
    """A row that every filter keeps."""
    a, b = question_id % 100, 7 * question_id % 100
    row = {
        "id": f"{question_id}/{number}",
        "question_id": question_id,
        "sample": number,
        "question": f"What is the sum of {a} and {b}, please, in question number {question_id}?",
        "prompt": f"User: {question_id}\nAssistant:",
        "completion": f"<think>{THOUGHTS} It is {a + b}, variant {number}.</think>\nThe sum is \\boxed{{{a + b}}}.",
        "num_tokens": 40 + number,
        "finish": "stop",
        "verdict": "right",
        "reason": "the numbers are equal",
        "components": [("accuracy", 1.0)],
        "language": "en",
        "domain": "math",
        "logp_mean": -0.5,
        "answer": str(a + b),
    }
    return row | changed


def write_samples(folder: Path, rows: list[dict[str, Any]], chunk_rows: int = 8) -> Path:
    """A folder `samples` with chunks, whose digests stand in counts.json beside it."""
    made = folder / "samples"
    made.mkdir(parents=True)
    files = {}
    for number, start in enumerate(range(0, len(rows), chunk_rows)):
        chunk = made / f"chunk_{number:05d}.parquet"
        table = pa.Table.from_pylist(rows[start : start + chunk_rows], schema=COLUMNS)
        pq.write_table(table, chunk, compression="zstd")
        files[chunk.name] = {"sha256": hashlib.sha256(chunk.read_bytes()).hexdigest()}
    (folder / "counts.json").write_text(json.dumps({"files": files}))
    return made
