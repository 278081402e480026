"""The folder of an evaluation: its manifest, the replies and the grades. No torch.

    manifest.json                         what is evaluated and how; written first
    samples/<benchmark>.<rank>.jsonl      replies, appended as they end (lines.SampleLine)
    grades/<benchmark>.<rank>.part.jsonl  grades, appended as they are known (lines.GradeLine)
    grades/<benchmark>.jsonl              the grades of all ranks, in the order of the questions
    summary.json, report.html             made of these

A process may be killed at any time: a last line without its end is no line, and what has no line is done again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from r1engine.config import ConfigError
from r1engine.evaluation.entries import Key
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.observe.put import put_json, put_text

MANIFEST, SUMMARY = "manifest.json", "summary.json"
FORMAT = 1
SYNC_SECONDS = 1.0  # lines of the last second may be lost when the machine, not the process, ends
BLOCK_BYTES = 2**24  # that are read at once
Line = TypeVar("Line", SampleLine, GradeLine)


class Appender:
    """A file of lines that this process alone appends to; usable from one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Cuts off a last line that has no end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._cut()
        self._synced_at = time.monotonic()

    def _cut(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - 2**16)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end != size:
            self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def append(self, line: SampleLine | GradeLine) -> None:
        """One line, at once in the hands of the operating system."""
        self._file.write(_json(line).encode())
        self._file.flush()
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Until the disk has all lines."""
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """The end."""
        self.sync()
        self._file.close()


class Store:
    """The files of an evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ------------------------------------------------------------------ the manifest

    @property
    def manifest(self) -> dict[str, Any]:
        """What is evaluated and how.

        Raises:
            ConfigError: this is no folder of an evaluation, or of another version.
        """
        path = self.folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.folder}: found no readable {MANIFEST}, required the folder of an evaluation"
            ) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ConfigError(f"{path}: found format {found.get('format')!r:.20}, required {FORMAT}")
        return found

    def begin(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest, or accepts that of an evaluation that goes on.

        Args:
            manifest: `same` maps dotted names to what must not change, `benchmarks` names to what is asked (more
                benchmarks and larger k may come later).

        Raises:
            ConfigError: the folder was begun with something else; the first difference is named.
        """
        if (self.folder / MANIFEST).exists():
            begun = self.manifest
            for name, value in manifest["same"].items():
                before = begun["same"].get(name, value)
                if before != value:
                    raise ConfigError(
                        f"{self.folder} was begun with {name} {before}, this is {value}: choose another out, or --fresh"
                    )
            manifest = manifest | {"benchmarks": begun["benchmarks"] | manifest["benchmarks"]}
            manifest["same"] = begun["same"] | manifest["same"]
        self.folder.mkdir(parents=True, exist_ok=True)
        put_json(self.folder / MANIFEST, {"format": FORMAT} | manifest)

    # ------------------------------------------------------------------ replies and grades

    def replies(self, benchmark: str) -> dict[Key, SampleLine]:
        """The replies that are there, of all ranks; of two to one question and sample the first counts."""
        found: dict[Key, SampleLine] = {}
        for path in sorted((self.folder / "samples").glob(f"{benchmark}.*.jsonl")):
            for line in read_lines(path, SampleLine):
                if line.is_done:
                    found.setdefault((line.q, line.s), line)
        return found

    def grades(self, benchmark: str, grader: str | None = None) -> dict[Key, GradeLine]:
        """The grades that are there, those of other numbers of the grader left out (None: none is)."""
        whole = self.folder / "grades" / f"{benchmark}.jsonl"
        parts = sorted((self.folder / "grades").glob(f"{benchmark}.*.part.jsonl"))
        found: dict[Key, GradeLine] = {}
        for path in [*([whole] if whole.exists() else []), *parts]:
            for line in read_lines(path, GradeLine):
                if grader is None or line.grader == grader:
                    found[line.q, line.s] = line
        return found

    def reply_file(self, benchmark: str, rank: int) -> Appender:
        """Where a rank puts its replies."""
        return Appender(self.folder / "samples" / f"{benchmark}.{rank}.jsonl")

    def grade_file(self, benchmark: str, rank: int) -> Appender:
        """Where a rank puts its grades."""
        return Appender(self.folder / "grades" / f"{benchmark}.{rank}.part.jsonl")

    def write_grades(self, benchmark: str, lines: Iterable[GradeLine]) -> None:
        """The grades in one file; the ranks' own are gone. Atomic."""
        folder = self.folder / "grades"
        folder.mkdir(parents=True, exist_ok=True)
        put_text(folder / f"{benchmark}.jsonl", "".join(map(_json, lines)))
        for part in folder.glob(f"{benchmark}.*.part.jsonl"):
            part.unlink()

    def discard_grades(self, benchmark: str) -> None:
        """As if nothing had been graded."""
        for path in (self.folder / "grades").glob(f"{benchmark}.*jsonl"):
            path.unlink()


def _json(line: SampleLine | GradeLine) -> str:
    return json.dumps(vars(line)) + "\n"  # dataclasses.asdict copies what is in it, which takes longer than all else


def read_lines(path: Path, kind: type[Line]) -> Iterator[Line]:
    """The lines of a file; a last one without its end is none.

    Raises:
        ConfigError: a line before it is broken; it is named.
    """
    number = 0
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            yield from _parsed(path, number, lines, kind)
            number += len(lines)


def _parsed(path: Path, before: int, lines: list[bytes], kind: type[Line]) -> list[Line]:
    """Lines behind the first `before` of a file: all at once, and one by one only to name the one that is broken."""
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
        if len(rows) == len(lines):
            return [kind(**row) for row in rows]
    except (ValueError, TypeError):
        pass
    found = []
    for number, line in enumerate(lines, start=before + 1):
        try:
            found.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: found no {kind.__name__}: {error}") from error
    return found
