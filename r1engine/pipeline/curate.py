"""The kind of stage `curate`: samples and conversations in, the data of supervised training out.

Three passes, none of which holds the rows in memory: each process filters units of the input and writes what is left;
the first one then compares the rows with each other by digests alone; and what is kept is dealt to buckets by a hash
and written in its order. So the rows and their order depend neither on the order of the input nor on the processes.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from r1engine.config import ConfigError
from r1engine.config.curate import CurateConfig
from r1engine.data import filters
from r1engine.data.contamination import EvaluationIndex, read_evaluation_texts
from r1engine.data.duplicates import clusters, rank, shingles
from r1engine.data.examples import Example, Unit, read_unit, units_of, write_examples
from r1engine.data.filters import Dropped, Target, measured, problem_of, target_of
from r1engine.data.mixture import wanted
from r1engine.observe.progress import Progress
from r1engine.pipeline.curate_output import BUCKET_TOKENS, Buckets, DroppedRow, write_data, write_dropped
from r1engine.pipeline.curate_report import shown, tell, write_counts, write_report

WORK = ".work"  # in the folder of the stage while it runs
SHOWN = 3  # rows of a reason in the report
SMALL_BYTES = 2**24  # of all files; so few are filtered before another process has begun


class Key(NamedTuple):
    """What the rows that pass the filters are compared by."""

    rank: int
    question: bytes
    thoughts: bytes  # digest of the answers, of their thoughts where there are some
    tokens: int
    domain: str
    overlap: str  # with an evaluation set


@dataclass
class Filtered:
    """What one process says of a unit; the rows themselves are in the files."""

    number: int
    keys: list[Key] = field(default_factory=list)
    shingles: dict[bytes, np.ndarray] = field(default_factory=dict)
    shown: dict[str, list[tuple[int, str, str, str]]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Filter:
    """What every process knows."""

    cfg: CurateConfig
    index: EvaluationIndex
    work: Path

    def unit(self, number: int, unit: Unit, target: Target | None) -> Filtered:
        """Filter a unit: what passes goes to the file `part`, what does not to `dropped`."""
        found, dropped = Filtered(number), list[DroppedRow]()
        write_examples(part(self.work, number), self._passing(unit, target, found, dropped))
        write_dropped(left_out(self.work, number), dropped)
        return found

    def _passing(
        self, unit: Unit, target: Target | None, found: Filtered, dropped: list[DroppedRow]
    ) -> Iterator[Example]:
        for example in read_unit(unit, self.cfg.summaries):
            problem = problem_of(example, self.cfg) or measured(example, self.cfg, target)
            if isinstance(problem, Dropped):
                dropped.append(DroppedRow(example.source, *problem, example.domain))
                show(found.shown[problem.reason], rank(self.cfg.seed, example.source), example, problem)
                continue
            kept = replace(example, num_tokens=problem)
            found.keys.append(self._key(kept, problem))
            if self.cfg.keep_per_question is not None and self.cfg.near_duplicate is not None:
                question = found.keys[-1].question
                if question not in found.shingles:
                    found.shingles[question] = shingles(kept.question)
            yield kept

    def _key(self, example: Example, num_tokens: int) -> Key:
        others = [message["content"] for message in example.messages if message["role"] != "user"]
        asked = [message["content"] for message in example.messages if message["role"] == "user"]
        overlap = self.index.find(asked, others) if len(self.index) else None
        compared = "\0".join(text.strip() for text in example.thoughts or example.answers)
        return Key(
            rank(self.cfg.seed, example.source),
            bytes.fromhex(example.question_sha)[:16],
            blake2b(compared.encode(errors="surrogatepass"), digest_size=16).digest(),
            num_tokens,
            example.domain,
            "" if overlap is None else str(overlap),
        )


def show(shown_before: list[tuple[int, str, str, str]], number: int, example: Example, problem: Dropped) -> None:
    """Keep a row for the report, if it is among the first of its reason by `number`."""
    shown_before.append((number, example.source, problem.detail, shown(example)))
    shown_before.sort()
    del shown_before[SHOWN:]


def part(work: Path, number: int) -> Path:
    """The rows of a unit that pass the filters."""
    return work / f"part_{number:06d}.parquet"


def left_out(work: Path, number: int) -> Path:
    """The rows of a unit that do not, with reasons."""
    return work / f"dropped_{number:06d}.parquet"


@cache
def _filter_of(work: Path, digest: str) -> tuple[Filter, Target | None]:
    """Once a process. Loading a pickle runs what it says: only what the first process has written is loaded."""
    data = (work / "filter").read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise RuntimeError(f"curate: {work / 'filter'} is not what this run has written; it is not loaded")
    found: Filter = pickle.loads(data)
    return found, target_of(found.cfg)


def _filter_unit(work: Path, digest: str, number: int, unit: Unit) -> Filtered:
    found, target = _filter_of(work, digest)
    return found.unit(number, unit, target)


def curate(cfg: CurateConfig, console: Console | None = None) -> dict[str, Any]:
    """Make the data; what was there before stays until the new files are whole.

    Returns:
        counts.json.

    Raises:
        ValueError: an input is damaged, or no rows are left, or too few for the mixture; it is named.
        OSError: a file cannot be written, such as on a full disk; nothing is left of this run.
    """
    console = console or Console()
    work = cfg.run_dir / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with Progress(f"curate {cfg.run_dir.name}", enabled=True, console=console) as progress:
            units, index = prepared(cfg)
            if cfg.refine is not None:
                from r1engine.pipeline.refine import refined

                units = refined(cfg, units, work, progress)
            results = _filtered(cfg, units, Filter(cfg, index, work), progress)
            counts = _write(cfg, results, work, progress)
    except BrokenProcessPool as error:
        raise RuntimeError("curate: a filtering process was killed; with less memory, set processes lower") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _filter_of.cache_clear()
    tell(cfg, counts, console)
    return counts


def prepared(cfg: CurateConfig) -> tuple[list[Unit], EvaluationIndex]:
    """What there is to read, and the n-grams that no row may have.

    Raises:
        ValueError: an input has no rows, or an evaluation set cannot be read.
    """
    units = units_of(cfg.sources, cfg.methods, _processes(cfg))
    texts = (text for path in cfg.decontaminate for text in read_evaluation_texts(path))
    return units, EvaluationIndex(texts, size=cfg.ngram)


def _processes(cfg: CurateConfig) -> int:
    return cfg.processes or len(os.sched_getaffinity(0))


def _filtered(cfg: CurateConfig, units: list[Unit], shared: Filter, progress: Progress) -> list[Filtered]:
    """Every unit, filtered; in their order."""
    data = pickle.dumps(shared)
    (shared.work / "filter").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    progress.phase("filter", len(units))
    results: list[Filtered] = []
    if min(_processes(cfg), len(units)) == 1 or sum(unit.path.stat().st_size for unit in units) < SMALL_BYTES:
        for number, unit in enumerate(units):
            results.append(_filter_unit(shared.work, digest, number, unit))
            progress.advance()
        return results
    # Spawned: a fork of a process that has threads (torch, gRPC) may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(min(_processes(cfg), len(units)), mp_context=context) as pool:
        futures = [pool.submit(_filter_unit, shared.work, digest, number, unit) for number, unit in enumerate(units)]
        try:
            for future in as_completed(futures):
                results.append(future.result())
                progress.advance()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return sorted(results, key=lambda result: result.number)


def compared(cfg: CurateConfig, keys: list[Key], questions: dict[bytes, np.ndarray]) -> dict[int, Dropped]:
    """What is left out because of other rows, or for what it shares: place in `keys` -> why.

    Of rows with the same thoughts one stays. Which answers of a question stay is decided among those that are clean,
    so that a contaminated one takes no place.

    Raises:
        ValueError: too few rows are left for the mixture.
    """
    order = sorted(range(len(keys)), key=lambda i: keys[i].rank)
    dropped: dict[int, Dropped] = {}
    seen: set[tuple[bytes, bytes]] = set()
    for i in order:
        key = keys[i]
        if (key.question, key.thoughts) in seen:
            dropped[i] = Dropped(filters.SAME)
        elif key.overlap:
            dropped[i] = Dropped(filters.CONTAMINATED, key.overlap)
        seen.add((key.question, key.thoughts))
    clean = [i for i in order if i not in dropped]
    if cfg.keep_per_question is not None:
        dropped |= _too_many(cfg, keys, clean, questions)
    return dropped | _not_mixed(cfg, keys, [i for i in clean if i not in dropped])


def _too_many(
    cfg: CurateConfig, keys: list[Key], clean: list[int], questions: dict[bytes, np.ndarray]
) -> dict[int, Dropped]:
    assert cfg.keep_per_question is not None
    names = {keys[i].question.hex() for i in clean}
    same = {name: name for name in names}
    if cfg.near_duplicate is not None:
        same = clusters({name: questions[bytes.fromhex(name)] for name in names}, cfg.near_duplicate)
    answers: dict[str, list[int]] = defaultdict(list)
    for i in clean if cfg.prefer == "random" else sorted(clean, key=lambda i: (keys[i].tokens, keys[i].rank)):
        answers[same[keys[i].question.hex()]].append(i)
    return {
        i: Dropped(filters.ONE_OF_MANY, f"{len(found)} right answers")
        for found in answers.values()
        for i in found[cfg.keep_per_question :]
    }


def _not_mixed(cfg: CurateConfig, keys: list[Key], left: list[int]) -> dict[int, Dropped]:
    by_domain: dict[str, list[int]] = defaultdict(list)
    for i in left:
        by_domain[keys[i].domain].append(i)
    take = wanted({domain: len(found) for domain, found in by_domain.items()}, cfg.counts, cfg.shares)
    return {
        i: Dropped(filters.NOT_MIXED, f"{take.get(domain, 0):,} of {len(found):,} rows of {domain}")
        for domain, found in by_domain.items()
        for i in found[take.get(domain, 0) :]
    }


def _write(cfg: CurateConfig, results: list[Filtered], work: Path, progress: Progress) -> dict[str, Any]:
    """The files of the stage, each whole: the data last."""
    progress.phase("compare")
    keys = [key for result in results for key in result.keys]
    questions = {name: found for result in results for name, found in result.shingles.items()}
    dropped = compared(cfg, keys, questions)
    examples: dict[str, list[tuple[int, str, str, str]]] = defaultdict(list)
    for result in results:
        for reason, found in result.shown.items():
            examples[reason] = sorted([*examples[reason], *found])[:SHOWN]
    progress.phase("write", len(keys))
    parts = [part(work, result.number) for result in results]
    others: list[DroppedRow] = []

    def decide(place: int, example: Example) -> bool:
        progress.advance()
        if (problem := dropped.get(place)) is None:
            return True
        others.append(DroppedRow(example.source, *problem, example.domain))
        show(examples[problem.reason], keys[place].rank, example, problem)
        return False

    buckets = 1 + sum(key.tokens for key in keys) // BUCKET_TOKENS
    write_data(work / "data.parquet", parts, decide, Buckets(work, buckets, cfg.seed), about(cfg))
    write_dropped(work / "dropped.parquet", others, [left_out(work, result.number) for result in results])
    counts = write_counts(work)
    if not counts["kept"]:
        raise ValueError(nothing_kept(cfg, counts))
    write_report(work / "report.html", cfg, counts, examples)
    for name in ("dropped.parquet", "counts.json", "report.html", "data.parquet"):
        os.replace(work / name, cfg.run_dir / name)
    return counts


def about(cfg: CurateConfig) -> dict[str, str]:
    """What data.parquet says of itself: the digest of tokenizer and template that num_tokens was counted with."""
    if (target := target_of(cfg)) is None or cfg.model.path is None:
        return {"num_tokens": "as the inputs say"}
    digest = blake2b(target.identity.encode() + (cfg.model.path / "tokenizer.json").read_bytes(), digest_size=32)
    return {"num_tokens": f"blake2b {digest.hexdigest()} of template {cfg.model.template} and tokenizer.json"}


def nothing_kept(cfg: CurateConfig, counts: dict[str, Any]) -> str:
    """What to say when every row has been left out."""
    reasons = ", ".join(f"{reason} {sum(found.values()):,}" for reason, found in counts["dropped"].items())
    advice = "lower language_min or sample at another temperature" if "mixed" in reasons else "see dropped.parquet"
    return f"{cfg.run_dir.name}: 0 of {counts['read']:,} rows are left ({reasons}); {advice}"


def check(cfg: CurateConfig) -> list[str]:
    """What a dry run can say: every row of the inputs is read, none is filtered. Returns notes.

    Raises:
        ConfigError: an input, the tokenizer or an evaluation set cannot be used; file and row are named.
    """
    try:
        target = target_of(cfg)
        units, index = prepared(cfg)
        rows = sum(1 for unit in units for _ in read_unit(unit, cfg.summaries))
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error
    notes = [f"{rows:,} rows in {len(units):,} files; {len(index):,} n-grams of evaluation sets"]
    if target is None:
        notes.append("model.path is null: markers of a template are not looked for, lengths are those of the inputs")
    if not len(index):
        notes.append("decontaminate is empty: nothing is compared with evaluation sets")
    return notes
