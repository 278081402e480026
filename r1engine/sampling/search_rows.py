"""Files of the stage `search`, the table over them, and one question's tree as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import numpy as np

from r1engine.config import ConfigError
from r1engine.evaluation.ratings import area_under_curve
from r1engine.evaluation.statistics import estimate
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer
from r1engine.observe.put import put_text
from r1engine.sampling.whole_lines import lines_of, whole_lines

Row = dict[str, Any]
FILE = "search.jsonl"


class SearchFiles:
    """Parts, one a search and rank, appended question by question; at the end one file in the order of the questions.

    The first line of a part says what it was made with.
    """

    def __init__(self, run_dir: Path, identity: Row) -> None:
        self._parts, self._run_dir = run_dir / "parts", run_dir
        self._identity = json.loads(json.dumps(identity))

    def check(self) -> None:
        """Refuse a folder that was made with something else.

        Raises:
            ConfigError: it was; the first difference is named.
        """
        self._parts.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._parts.glob("*.jsonl")):
            header = next(whole_lines(path), self._identity)
            if header == self._identity:
                continue
            key = next((k for k in self._identity if header.get(k) != self._identity[k]), "keys")
            found, required = header.get(key), self._identity.get(key)
            if isinstance(found, dict) and isinstance(required, dict):  # a section: its first key that differs
                inner = next(k for k in {**found, **required} if found.get(k) != required.get(k))
                key, found, required = f"{key}.{inner}", found.get(inner), required.get(inner)
            raise ConfigError(
                f"{self._run_dir} was searched with {key} {found}, now it is {required}; choose another run_dir"
            )

    def done(self, name: str) -> set[int]:
        """Questions that a search has finished."""
        return {row["id"] for row in self._rows(name)}

    @contextmanager
    def part(self, name: str, rank: int) -> Iterator[RowFile]:
        """Where a rank appends its rows. A line that a kill has cut off is removed."""
        path = self._parts / f"{name}.{rank}.jsonl"
        whole = [*whole_lines(path)] or [self._identity]
        put_text(path, lines_of(whole))
        with open(path, "a", encoding="utf-8") as file:
            yield RowFile(file)

    def spent(self, name: str, rank: int, row: Row) -> None:
        """What the models have run for finished questions."""
        with open(self._parts / f"{name}.{rank}.spent", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def totals(self) -> dict[str, Row]:
        """Search -> tokens that the policy and the scorer have run, and seconds of the slowest rank.

        Work that a kill has lost is not in it. None: a generator or a server that does not tell.
        """
        found: dict[str, Row] = {}
        for path in sorted(self._parts.glob("*.spent")):
            lines, name = [*whole_lines(path)], path.name.rsplit(".", 2)[0]
            total = found.setdefault(name, {"policy": 0, "scorer": 0, "seconds": 0.0})
            for key in ("policy", "scorer"):
                run = [line[key] for line in lines]
                total[key] = total[key] + sum(run) if total[key] is not None and None not in run else None
            total["seconds"] = max(total["seconds"], sum(line["seconds"] for line in lines))
        return found

    def merge(self, names: list[str]) -> list[Row]:
        """Write all rows as one file, search after search, and return them."""
        rows = [row for name in names for row in sorted(self._rows(name), key=lambda row: row["id"])]
        put_text(self._run_dir / FILE, lines_of(rows))
        return rows

    def _rows(self, name: str) -> Iterator[Row]:
        for path in sorted(self._parts.glob(f"{name}.*.jsonl")):
            yield from islice(whole_lines(path), 1, None)


class RowFile:
    """A file that grows by a line a question."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: Row) -> None:
        """One question, at once on the disk."""
        self._file.write(lines_of([row]))
        self._file.flush()


def table_of(rows: list[Row], totals: dict[str, Row], names: list[str]) -> Row:
    """Accuracy with its 95 % interval over questions, and what a question cost, of each search.

    A question without an answer is wrong; one whose answer is undecided is left out of the accuracy and counted.
    """
    searches = {}
    for name in names:
        own = [row for row in rows if row["search"] == name]
        decided = [float(row["verdict"] == "right") for row in own if row["verdict"] != "undecided"]
        found = estimate(decided) if decided else None
        cost = totals.get(name, {"policy": None, "scorer": 0, "seconds": 0.0})
        searches[name] = {
            "questions": len(own),
            "accuracy": found.mean if found else None,
            "low": found.low if found else None,
            "high": found.high if found else None,
            **{how: _accuracy(own, how) for how in ("vote", "best", "majority")},
            "any_right": fmean(solved) if (solved := _solved(own)) else None,
            "pass_at_1": fmean(shares) if (shares := shares_right(own)) and name.startswith("best_of") else None,
            "auc": _told_apart(own),
            "undecided": len(own) - len(decided),
            "without_answer": sum(row["answer"] is None for row in own),
            "cut": sum(row["cut"] for row in own),
            "drawn": fmean(row["drawn"] for row in own) if own else None,
            "policy_run": cost["policy"] / len(own) if own and cost["policy"] is not None else None,
            "scorer_run": cost["scorer"] / len(own) if own and cost["scorer"] is not None else None,
            "seconds": cost["seconds"],
        }
    return {"searches": searches}


def shares_right(rows: list[Row]) -> list[float]:
    """Of the questions of which something is decided, the share of right ones among the completions that ended."""
    return [row["right"] / row["decided"] for row in rows if row["decided"]]


def _solved(rows: list[Row]) -> list[bool]:
    """Whether a question has a right completion; without those that have none, but an undecided one."""
    return [row["right"] > 0 for row in rows if row["right"] or row["decided"] == row["ended"]]


def _told_apart(rows: list[Row]) -> float | None:
    """The probability that a right completion has a higher value than a wrong one; None where one kind is missing."""
    ends = [
        (node["value"], node["verdict"] == "right")
        for row in rows
        for node in row["nodes"]
        if node.get("verdict") in ("right", "wrong") and node["finish"] == "stop"
    ]
    values, right = np.array(ends, np.float64).reshape(-1, 2).T
    return area_under_curve(values, right > 0)


def _accuracy(rows: list[Row], how: str) -> float | None:
    decided = [row["verdicts"][how] == "right" for row in rows if row["verdicts"][how] != "undecided"]
    return fmean(decided) if decided else None


def markdown(table: Row) -> str:
    """The table as text; tokens are of a question."""
    head = "| search | accuracy | vote / best / majority | drawn | policy run | scorer run | seconds |"
    lines = [head, "|" + " --- |" * 7]
    for name, found in table["searches"].items():
        shares = " / ".join(_share(found[how]) for how in ("vote", "best", "majority"))
        interval = f"{_share(found['accuracy'])} ({_share(found['low'])} to {_share(found['high'])})"
        tokens = " | ".join(_tokens(found[key]) for key in ("drawn", "policy_run", "scorer_run"))
        lines.append(f"| {name} | {interval} | {shares} | {tokens} | {found['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tokens(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def print_tree(run_dir: Path, question: int, echo: Callable[[str], None]) -> None:
    """Print what was searched for one question: value, visits and text of each step.

    Raises:
        ConfigError: nothing was searched there, or not this question.
    """
    from r1engine.config import load
    from r1engine.config.searching import SearchConfig

    found = [*whole_lines(run_dir / FILE)]
    if not found:
        raise ConfigError(f"{run_dir / FILE}: found nothing, required the file of a search that has ended")
    rows = [row for row in found if row["id"] == question]
    if not rows:
        last = max(row["id"] for row in found)
        raise ConfigError(
            f"{run_dir / FILE}: found no question {question}, required one that was searched, 0 to {last}"
        )
    cfg = load(run_dir / "config.yaml", [], SearchConfig)
    assert cfg.model.path is not None
    tokenizer = load_tokenizer(cfg.model.path)
    for row in rows:
        echo(f"{row['search']}: {row['question']}\n{tree_text(row, tokenizer, most=None)}")


def tree_text(row: Row, tokenizer: PromptTokenizer, *, most: int | None) -> str:
    """A tree, a line a step, `most` of them: value, visits, text, and at an end answer and verdict; *: chosen."""
    lines = [f"answer {row['answer']} ({row['verdict']}), {row['drawn']} tokens drawn, {row['rounds']} rounds"]
    for depth, node in in_depth(row["nodes"]):
        tokens = [token for step in node["tokens"] for token in step]
        end = f"  -> {node['answer']} ({node['verdict']})" if node["finish"] else ""
        visits = f" {node['visits']:3d} visits" if node["visits"] else ""
        text = tokenizer.decode(tokens).replace("\n", "\\n")
        chosen = " *" if node["node"] == row["node"] else ""
        value = f"{node['value']:.2f}" if node["tokens"] else "a tree"  # of its own, without a step that has a value
        lines.append(f"{'  ' * depth}{value}{visits}  {text}{end}{chosen}")
        if most is not None and len(lines) > most:
            lines.append(f"... {len(row['nodes'])} steps in all; r1engine search CONFIG --question {row['id']}")
            break
    return "\n".join(lines)


def in_depth(nodes: list[Row]) -> Iterator[tuple[int, Row]]:
    """(depth, node) of a tree, each before its children, the more visited or better child first."""
    children: dict[int, list[Row]] = {}
    for node in nodes:
        children.setdefault(node["parent"], []).append(node)

    def below(number: int, depth: int) -> Iterator[tuple[int, Row]]:
        for node in sorted(children.get(number, []), key=lambda one: (-one["visits"], -one["value"], one["node"])):
            yield depth, node
            yield from below(node["node"], depth + 1)

    yield from below(0, 0)
