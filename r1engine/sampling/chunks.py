"""Files of graded answers: whole or absent, each with its SHA-256 in counts.json.

samples/chunk_00017.parquet holds all answers to some questions. It is written under another name and renamed; only
then counts.json names it. What counts.json does not name is drawn again, and is the same.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from r1engine.batch import Completion
from r1engine.config import ConfigError
from r1engine.data.examples import COUNTS
from r1engine.data.stream import file_digest
from r1engine.observe.put import put_json
from r1engine.rewards import Score
from r1engine.rewards.language import language_of

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1

Counts = dict[str, dict[str, int]]  # domain -> of drawn, right, wrong, undecided, truncated, kept: right and whole


def schema() -> pyarrow.Schema:
    """Columns of a file of samples (docs/pipeline.md)."""
    import pyarrow as pa

    texts = (
        "question",
        "prompt",
        "completion",
        "finish",
        "verdict",
        "reason",
        "language",
        "domain",
        "answer",
        "reward",
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("question_id", pa.int64()),
            ("sample", pa.int16()),
            *((name, pa.string()) for name in texts),
            ("tests", pa.string()),
            ("num_tokens", pa.int32()),
            ("logp_mean", pa.float64()),
            ("components", pa.map_(pa.string(), pa.float64())),
        ]
    )


def row_of(completion: Completion, score: Score) -> dict[str, Any]:
    """A graded answer as a row of the file."""
    prompt, question = completion.prompt, completion.prompt.question
    return {
        "id": f"{prompt.id}/{completion.sample}",
        "question_id": prompt.id,
        "sample": completion.sample,
        "question": question.text,
        "prompt": prompt.text,
        "completion": completion.text,
        "finish": "length" if completion.truncated else "stop",
        "verdict": score.verdict,
        "reason": score.reason,
        "language": question.language or language_of(question.text),
        "domain": question.counted_as,
        "answer": question.answer,
        "reward": question.reward,
        "tests": None if question.tests is None else json.dumps(question.tests, ensure_ascii=False),
        "num_tokens": len(completion.tokens),
        "logp_mean": fmean(completion.logp) if completion.logp else math.nan,
        "components": sorted(score.components.items()),
    }


def counts_of(rows: Sequence[dict[str, Any]]) -> Counts:
    """What of the rows is right, by domain."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        counter = found.setdefault(row["domain"], Counter())
        is_kept = row["verdict"] == "right" and row["finish"] == "stop"
        counter.update(drawn=1, truncated=int(row["finish"] == "length"), kept=int(is_kept), tokens=row["num_tokens"])
        counter[row["verdict"]] += 1
    return {domain: dict(counter) for domain, counter in sorted(found.items())}


class Chunks:
    """The files of one folder, and what counts.json says of them."""

    def __init__(self, run_dir: Path, identity: dict[str, Any]) -> None:
        """Reads counts.json and proves that the files are what it says.

        Args:
            run_dir:  of the stage.
            identity: what the answers depend on; files that were drawn from something else are refused.

        Raises:
            ConfigError: a file was damaged, or drawn from something else.
        """
        self.folder, self._path, self._identity = run_dir / "samples", run_dir / COUNTS, identity
        self.folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        there: dict[str, Any] = found.get("identity", identity)
        if changed := [key for key in sorted(there.keys() | identity.keys()) if there.get(key) != identity.get(key)]:
            raise ConfigError(
                f"{self._path}: its samples were drawn with another "
                + ", ".join(f"{key} ({there.get(key)}, now {identity.get(key)})" for key in changed)
                + "; choose another run_dir"
            )
        self._files: dict[str, dict[str, Any]] = found.get("files", {})
        for name, entry in list(self._files.items()):
            file = self.folder / name
            if not file.is_file():
                del self._files[name]
            elif file_digest(file) != entry["sha256"]:
                raise ConfigError(
                    f"{file}: SHA-256 differs from {COUNTS}; delete it and run again: only this chunk is drawn again"
                )

    def __len__(self) -> int:
        return len(self._files)

    def counts(self, number: int) -> Counts | None:
        """What chunk `number` holds; None: it is not there."""
        entry = self._files.get(_name(number))
        return None if entry is None else entry["counts"]

    def note(self, number: int, counts: Counts) -> None:
        """Take note of a chunk that another rank has written."""
        self._files.setdefault(_name(number), {"counts": counts})

    def write(self, number: int, rows: Sequence[dict[str, Any]]) -> Counts:
        """Write a chunk, then its name into counts.json; returns what it holds.

        Raises:
            OSError: the disk is full; the chunk is absent then.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = _name(number)
        table = pa.Table.from_pylist(list(rows), schema=schema().with_metadata(self._metadata(number)))
        temporary = self.folder / f".{name}"
        try:
            pq.write_table(table, temporary, compression="zstd")
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        counts = counts_of(rows)
        self._files[name] = {"sha256": file_digest(self.folder / name), "counts": counts}
        self._write_counts()
        return counts

    def total(self) -> Counts:
        """Of all chunks."""
        found: dict[str, Counter[str]] = {}
        for entry in self._files.values():
            for domain, counts in entry["counts"].items():
                found.setdefault(domain, Counter()).update(counts)
        return {domain: dict(counts) for domain, counts in sorted(found.items())}

    def _write_counts(self) -> None:
        content = {
            "format": FORMAT,
            "identity": self._identity,
            "domains": self.total(),
            "files": dict(sorted(self._files.items())),
        }
        put_json(self._path, content)

    def _metadata(self, number: int) -> dict[str, str]:
        return {"r1engine.chunk": str(number), "r1engine.samples": json.dumps(self._identity, ensure_ascii=False)}


def _name(number: int) -> str:
    return f"chunk_{number:05d}.parquet"
