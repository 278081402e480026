"""The benchmarks of a suite with their questions, and what is to be asked: the plan of an evaluation. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from r1engine.config import ConfigError
from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Benchmark, Item
from r1engine.evaluation.benchmarks import benchmark_of

Key = tuple[str, int]  # question and sample of a reply


@dataclass(frozen=True)
class Entry:
    """One benchmark of a suite, loaded."""

    name: str  # in the suite
    row: Benchmark
    settings: BenchmarkSettings
    items: list[Item]
    samples: int  # k

    @property
    def is_private(self) -> bool:
        """Whether pages show no text of it."""
        return self.row.private or self.settings.private

    def asks(self, seed: int) -> Iterable[Ask]:
        """Every reply, question after question."""
        return (Ask(self, item, sample, seed) for item in self.items for sample in range(self.samples))


@dataclass(frozen=True)
class Ask:
    """One reply to be drawn."""

    entry: Entry
    item: Item
    sample: int
    run_seed: int

    @property
    def key(self) -> Key:
        """Of the reply in its benchmark's files."""
        return self.item.id, self.sample

    @property
    def seed(self) -> int:
        """48 bits of the names of benchmark and question, the sample and the suite's seed: what else is asked, in which
        order and on how many ranks changes no sample, and no two replies share random numbers."""
        return stream_seed(self.run_seed, self.entry.name, self.item.id, self.sample)

    @property
    def text(self) -> str:
        """The user's message."""
        return self.entry.row.ask(self.item, self.sample)

    @property
    def place(self) -> str:
        """For messages."""
        return self.item.question.place or f"{self.entry.name}: {self.item.id}"


def stream_seed(seed: int, benchmark: str, question: str, sample: int) -> int:
    """First 48 bits of the SHA-256 of the four."""
    names = f"{seed}\0{benchmark}\0{question}\0{sample}"
    return int.from_bytes(hashlib.sha256(names.encode("utf-8", "surrogatepass")).digest()[:6], "big")


def load_entries(benchmarks: Mapping[str, BenchmarkSettings], *, has_judge: bool) -> list[Entry]:
    """The benchmarks with their questions, the one of most replies first: its long tail is drawn beside the others.

    Raises:
        ConfigError: there is no such benchmark or file, the file is not the owners', no question is left, or a judge is
            needed and there is none; every problem is listed.
    """
    entries, problems = [], []
    for name, settings in benchmarks.items():
        try:
            entries.append(_load(name, settings, has_judge))
        except (ValueError, OSError) as error:
            problems += ConfigError.of(error).problems
    if problems:
        raise ConfigError(problems)
    return sorted(entries, key=lambda entry: -entry.samples * len(entry.items))


def _load(name: str, settings: BenchmarkSettings, has_judge: bool) -> Entry:
    row = benchmark_of(settings.kind or name, f"benchmarks.{name}")
    if not settings.file.exists():
        raise ValueError(
            f"benchmarks.{name}.file: found no file {settings.file}; it is not shipped: docs/evaluation.md says where "
            f"its owners give it ({row.wanted})"
        )
    if row.needs_judge and not has_judge:
        raise ValueError(f"rewards.judge: found null, required by benchmarks.{name}")
    items = row.load(settings)[: settings.questions]
    if not items:
        raise ValueError(f"benchmarks.{name}: found no question, required at least one")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"{settings.file}: found question {twice!r:.60} twice, required ids that differ")
    if not has_judge and any(item.question.reward == "judge" for item in items):
        raise ValueError(f"rewards.judge: found null, required by the questions of benchmarks.{name}")
    return Entry(name, row, settings, items, settings.samples_of(len(items)))


def cautions(entries: list[Entry]) -> list[str]:
    """Why a number may not be comparable with the paper's."""
    found = []
    for entry in entries:
        row, asked = entry.row, len(entry.items)
        if row.published is not None and asked != row.published:
            found.append(
                f"{entry.name}: {asked:,} questions, the published set has {row.published:,}; the paper's number is "
                "not comparable"
            )
        if row.name == "livecodebench" and None in (entry.settings.first_day, entry.settings.last_day):
            found.append(f"{entry.name}: no first_day or last_day; the paper's window is 2024-08-01 to 2025-01-31")
    return found


def file_sha256(path: Path) -> str:
    """Of a file, or of a folder's files with their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() + b"\0" if path.is_dir() else b"")
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
    return digest.hexdigest()
