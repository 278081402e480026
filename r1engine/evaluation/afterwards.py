"""What is done with an evaluation when nothing draws: grade again, import verdicts, find those of a run. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1engine.config import ConfigError
from r1engine.config.evaluation import Suite
from r1engine.config.source import Source, read_overrides, validate
from r1engine.data.rows import read_rows
from r1engine.evaluation.entries import Entry, Key, file_sha256, load_entries
from r1engine.evaluation.harnesses import exported, harness_verdicts
from r1engine.evaluation.lines import GradeLine
from r1engine.evaluation.marking import Judge
from r1engine.evaluation.meter import Meter
from r1engine.evaluation.results import Summary, as_json, question_scores
from r1engine.evaluation.runner import Grading, Missing, Runner, summarize_all
from r1engine.evaluation.statistics import estimate
from r1engine.evaluation.store import SUMMARY, Store
from r1engine.observe.put import put_json
from r1engine.rewards.from_config import make_scorer
from r1engine.rewards.record import Verdict


def suite_of(store: Store, overrides: list[str]) -> Suite:
    """The suite that an evaluation was begun with, with overrides of its section `rewards` (another judge).

    Raises:
        ConfigError: an override is of another key, or the settings are those of another version.
    """
    settings = store.manifest["settings"]
    for override in overrides:
        if not override.startswith("rewards."):
            raise ConfigError(
                f"override '{override}': required a key of rewards: replies are there, only grades change"
            )
    changes = read_overrides(overrides)
    source = Source(settings, {})
    for key, value in (changes.data.get("rewards") or {}).items():
        source.data["rewards"][key] = value
    return validate(Suite, source)


def grade_again(store: Store, overrides: list[str], note: Callable[[str], None] = print) -> dict[str, Summary]:
    """Grades all stored replies anew, without a model; replaces grades and summary.

    Raises:
        ConfigError: a file of questions is gone or has changed.
    """
    suite, manifest = suite_of(store, overrides), store.manifest
    entries = load_entries(suite.benchmarks, has_judge=suite.rewards.judge is not None)
    _refuse_changed(entries, manifest)
    replies = {entry.name: store.replies(entry.name) for entry in entries}
    todo = [
        (ask, replies[entry.name][ask.key])
        for entry in entries
        for ask in entry.asks(suite.seed)
        if ask.key in replies[entry.name]
    ]
    for entry in entries:
        store.discard_grades(entry.name)
    with make_scorer(suite.rewards) as scorer:
        judge = Judge(suite.rewards.judge) if suite.rewards.judge is not None else None
        Runner(store, 0, Meter(0, enabled=False)).work(Missing([], todo), None, Grading(scorer, judge))
    for entry in entries:
        manifest["benchmarks"][entry.name]["grader"] = entry.row.grader
    put_json(store.folder / "manifest.json", manifest)
    note(f"{len(todo):,} replies are graded")
    return summarize_all(store, entries)


def _refuse_changed(entries: list[Entry], manifest: dict[str, Any]) -> None:
    for entry in entries:
        begun = manifest["benchmarks"][entry.name]["file"]
        if file_sha256(entry.settings.file) != begun:
            raise ConfigError(
                f"benchmarks.{entry.name}.file: {entry.settings.file} has changed since replies were drawn, required "
                f"the file of SHA-256 {begun[:12]}..."
            )


def import_verdicts(file: Path, out: Path, benchmark: str, target: str) -> Summary:
    """Takes the verdicts of another harness, so that intervals and comparisons hold for them, too.

    Args:
        file:      JSONL: `question` (id), `right` (true, false or a score in [0, 1]; null: undecided), `sample` (0 if
            absent); or what the benchmark's own harness writes, see `harness_verdicts`.
        out:       folder of an evaluation, or a new one.
        benchmark: what the verdicts are of.
        target:    whose they are, where the folder is new.

    Raises:
        ConfigError: a line is no verdict, or two are of one sample.
    """
    lines = _verdicts(file, benchmark)
    store = Store(out)
    if not (out / "manifest.json").exists():
        store.begin({"target": target, "settings": {}, "same": {}, "benchmarks": {}})
    manifest = store.manifest
    samples = max(s for _, s in lines) + 1
    asked = {"kind": "imported", "questions": len({q for q, _ in lines}), "samples": samples, "grader": "imported/1"}
    manifest["benchmarks"][benchmark] = asked
    put_json(out / "manifest.json", manifest)
    store.write_grades(benchmark, lines.values())
    scores = list(question_scores(lines).values())
    undecided = sum(line.score is None for line in lines.values())
    summary: Summary = {
        "title": benchmark,
        "metric": "imported",
        "private": True,
        **asked,
        "replies": len(lines),
        "missing": 0,
        "score": as_json(estimate(scores)) if scores else None,
        "undecided": {"count": undecided},
    }
    path = out / SUMMARY
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"target": target, "benchmarks": {}}
    found["benchmarks"][benchmark] = summary
    put_json(path, found)
    return summary


def export_replies(out: Path, benchmark: str, model: str, file: Path) -> int:
    """Writes the first reply to each question as the benchmark's own harness reads it; how many there are.

    Raises:
        ConfigError: the evaluation has no such benchmark, its file of questions has changed, or a reply is missing.
    """
    store = Store(out)
    suite = suite_of(store, [])
    if benchmark not in suite.benchmarks:
        raise ConfigError(f"{out}: found no benchmark {benchmark}, required one of {', '.join(suite.benchmarks)}")
    (entry,) = load_entries({benchmark: suite.benchmarks[benchmark]}, has_judge=True)
    _refuse_changed([entry], store.manifest)
    replies = {q: line.text for (q, s), line in store.replies(benchmark).items() if s == 0}
    try:
        text = exported(entry.row.name, entry.items, replies, model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    file.write_text(text, encoding="utf-8")
    return len(entry.items)


def _verdicts(file: Path, benchmark: str) -> dict[Key, GradeLine]:
    lines: dict[Key, GradeLine] = {}
    try:
        if (found := harness_verdicts(benchmark, file)) is not None:
            own = [_verdict({"question": one.question, "right": one.right}, str(file)) for one in found]
            return {(line.q, line.s): line for line in own}
        for row in read_rows(file, ("question", "right", "sample")):
            line = _verdict(row.fields, row.place)
            if (line.q, line.s) in lines:
                raise ValueError(f"{row.place}: found question {line.q!r}, sample {line.s} again, required one verdict")
            lines[line.q, line.s] = line
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return lines


def _verdict(fields: dict[str, Any], place: str) -> GradeLine:
    question, right, sample = fields.get("question"), fields.get("right"), fields.get("sample", 0)
    if not isinstance(question, str | int) or isinstance(question, bool):
        raise ValueError(f"{place}: question is {question!r:.60}, required the id of one")
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise ValueError(f"{place}: sample is {sample!r:.60}, required a number from 0")
    if right is not None and (not isinstance(right, bool | int | float) or not 0 <= right <= 1):
        raise ValueError(f"{place}: right is {right!r:.60}, required true, false, a score in [0, 1] or null")
    score = None if right is None else float(right)
    verdict: Verdict = "undecided" if score is None else "right" if score == 1 else "wrong"
    return GradeLine(str(question), sample, verdict, score, None, "imported", "imported/1")


def stored_summary(folder: Path) -> dict[str, Any]:
    """summary.json of an evaluation.

    Raises:
        ConfigError: there is none.
    """
    _ = Store(folder).manifest  # refuses what is no evaluation
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: found no {SUMMARY}: the evaluation has not come to its end; the command that began it goes on"
        ) from error


def run_evaluations(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the evaluations that a run made while it trained, in order.

    Raises:
        ConfigError: there are none.
    """
    found = []
    for path in sorted((run_dir / "evaluation").glob("step_*")):
        if (path / SUMMARY).is_file():
            found.append((int(path.name.removeprefix("step_")), path))
    if not found:
        raise ConfigError(
            f"board: found no evaluation in {run_dir}/evaluation, required the folder of a run that makes some"
        )
    return found


def scores_in(folder: Path, benchmark: str) -> dict[str, float]:
    """The score of each question."""
    grades = Store(folder).grades(benchmark)
    return question_scores(grades)
