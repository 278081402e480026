"""`r1engine reward`: scores a file of completions, and says where the points were lost."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from r1engine.data.questions import FIELDS, read_question
from r1engine.data.reading import reference_in
from r1engine.data.rows import parse_line
from r1engine.rewards.functions.rule import FUNCTIONS
from r1engine.rewards.record import Record, Score
from r1engine.rewards.rule import Rule
from r1engine.rewards.rules import rule_of
from r1engine.rewards.sandbox import probe
from r1engine.rewards.scorer import Scorer

_VARIABLE = r"(?<!\S)(?!\\boxed\{\})\S*[\d\\{}](?:\S*[^\s;:,])?"  # a number or formula, not the mark behind it
SHOWN = 20  # undecided records that are listed; all are in the output file


def score_file(source: Path, out: Path, scorer: Scorer, console: Console) -> None:
    """Writes one JSON line a record: id, reward, verdict, score, components, reason, seconds; prints a summary.

    `score` is the component that the record's reward names (of reward "functions" the first one), or null if it is
    undecided.

    Raises:
        ValueError: the source holds something that is no record, see `read_records`; nothing is written then.
        RuntimeError: a record needs code to be run, and too little protects here.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: found the input itself, required another file")
    if out.is_dir():
        raise ValueError(f"{out}: found a folder, required the name of a file to write")
    first = next(iter(scorer.settings.functions.paths), None)
    records = read_records(source, None if first is None else "functions")
    if any(_rule(record).runs_code for record in records):
        lines = ["code runs in a sandbox of:", *probe().describe()]
        console.print("\n  ".join(lines), highlight=False, markup=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    columns = (TextColumn("score"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with partial.open("w", encoding="utf-8") as file, Progress(*columns, console=console) as progress:
        task, waiting = progress.add_task("score", total=len(records)), iter(records)

        def done(score: Score) -> None:
            file.write(json.dumps(_row(next(waiting), score, first)) + "\n")
            progress.advance(task)

        scores = scorer.score(records, done)
    os.replace(partial, out)
    _print_summary(list(zip(records, scores, strict=True)), console)
    console.print(f"written: {out}", highlight=False)


def read_records(path: Path, reward: str | None = None) -> list[Record]:
    """The records of a JSONL file: reward, completion, and what the reward needs; id is the line if not given.

    `reward` is that of lines that name none; None: math, as in data. The answer of math may be a whole solution.

    Bytes that are no UTF-8 are kept as lone surrogates, as they can only come from a completion.

    Raises:
        ValueError: no such file, no records, or a line that is no record; the line is named.
    """
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, required a .jsonl file of completions")
    records = []
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_record(line, f"{path}:{number}", number, reward))
    if not records:
        raise ValueError(f"{path}: found no records, required at least one")
    return records


def _record(line: str, where: str, number: int, reward: str | None) -> Record:
    row = parse_line(line, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, required an object with `reward` and `completion`")
    defaults = {"prompt": "", "question": "", "reward": reward or "math"}
    row = defaults | {name: value for name, value in row.items() if value is not None}
    if row["reward"] == "math" and isinstance(row.get("answer"), str):
        row["answer"] = reference_in(row["answer"], "auto")
    for name in ("reward", "completion", "prompt"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} is {row.get(name)!r:.80}, required a text")
    own = (*FIELDS, "id", "prompt", "completion", "num_tokens", "truncated", "reason")
    others = {name: value for name, value in row.items() if name not in own}
    columns = others["columns"] if isinstance(others.get("columns"), dict) else others  # the former in undecided.jsonl
    question = replace(read_question(row, where), columns=columns or None)
    tokens, truncated = row.get("num_tokens"), row.get("truncated") is True
    return Record(question, row["completion"], row["prompt"], str(row.get("id", number)), tokens, truncated)


def _rule(record: Record) -> Rule:
    return rule_of(record.question.reward, record.question.place)


def _row(record: Record, score: Score, first_function: str | None) -> dict:
    rule = _rule(record)
    value = score.components.get(first_function or "" if rule is FUNCTIONS else rule.component)
    return {
        "id": record.id,
        "reward": record.question.reward,
        "verdict": score.verdict,
        "score": value,
        "components": score.components,
        "reason": score.reason,
        "seconds": round(score.seconds, 6),
    } | ({"unknown": score.unknown} if score.unknown else {})


def _print_summary(graded: list[tuple[Record, Score]], console: Console) -> None:
    rewards, values = Table(title="verdicts"), defaultdict(list)
    for name in ("reward", "records", "right", "wrong", "undecided", "seconds p50", "p99"):
        rewards.add_column(name, justify="left" if name == "reward" else "right")
    for reward in sorted({record.question.reward for record, _ in graded}):
        scores = [score for record, score in graded if record.question.reward == reward]
        counts = Counter(score.verdict for score in scores)
        seconds = sorted(score.seconds for score in scores)
        quantiles = [f"{seconds[int(share * (len(seconds) - 1))]:.4f}" for share in (0.5, 0.99)]
        numbers = [str(counts[verdict]) for verdict in ("right", "wrong", "undecided")]
        rewards.add_row(reward, str(len(scores)), *numbers, *quantiles)
        for score in scores:
            for name, value in score.components.items():
                values[reward, name].append(value)
    components = Table(title="components")
    for name in ("reward", "component", "values", "mean"):
        components.add_column(name, justify="left" if name in ("reward", "component") else "right")
    for (reward, name), found in sorted(values.items()):
        components.add_row(reward, name, str(len(found)), f"{sum(found) / len(found):.3f}")
    console.print(rewards, components)
    _print_reasons(
        "most frequent reasons of wrong (# stands for a number or formula)",
        [s.reason for _, s in graded if s.verdict == "wrong"],
        console,
    )
    undecided = [(record, score) for record, score in graded if score.verdict == "undecided"]
    if undecided:
        console.print(f"undecided: {len(undecided)} (no reward of 0: leave them out)")
        for record, score in undecided[:SHOWN]:
            console.print(f"  {record.id}: {score.reason}", highlight=False, markup=False)
        if len(undecided) > SHOWN:
            console.print(f"  and {len(undecided) - SHOWN} more in the output file")


def _print_reasons(title: str, reasons: list[str], console: Console) -> None:
    """Reasons that differ only in a number or formula are counted together; an empty box is none."""
    kinds = Counter(re.sub(_VARIABLE, "#", reason)[:100] for reason in reasons)
    if kinds:
        console.print(title + ":")
        for kind, count in kinds.most_common(5):
            console.print(f"  {count} x {kind}", highlight=False, markup=False)
