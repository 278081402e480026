"""Tables of evaluations on a terminal. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from r1engine.evaluation.afterwards import run_evaluations, stored_summary
from r1engine.evaluation.benchmarks import BENCHMARKS
from r1engine.evaluation.compare import Paired, paired
from r1engine.evaluation.results import Summary

SHOWN_MODELS = ("DeepSeek-R1", "DeepSeek-R1-Zero", "OpenAI-o1-1217", "DeepSeek-V3")  # of the paper, in the table
RESULT_COLUMNS = (
    "benchmark",
    "n x k",
    "metric",
    "score",
    "cons",
    "undecided",
    "truncated",
    "unread",
    "tokens",
    "paper",
)


@cache
def paper_scores() -> dict[str, Any]:
    """The paper's numbers (Tables 2, 4, 5, 6 and Figure 2): `scores`, each with table, model, benchmark, metric and
    value in points; `notes`, with what contradicts them elsewhere."""
    return json.loads((Path(__file__).parent / "paper_scores.json").read_text(encoding="utf-8"))


def papers(benchmark: str) -> dict[str, float]:
    """Model -> the paper's score of a benchmark in points, without those of majority votes; empty if it has none."""
    found: dict[str, float] = {}
    for score in paper_scores()["scores"]:
        if score["benchmark"] == benchmark and not score["metric"].startswith("cons"):
            found.setdefault(score["model"], score["value"])
    return found


def points(score: Summary | None) -> str:
    """The score in points, with half of the 95 % interval's width."""
    if score is None:
        return "undecided"
    return f"{100 * score['mean']:.1f} \u00b1 {50 * (score['high'] - score['low']):.1f}"


def share(value: float | None) -> str:
    """A share in percent, "-" if it is not known."""
    return "-" if value is None else f"{value:.1%}"


def vote(found: Summary) -> str:
    """The majority vote's points, "-" if it was not asked for."""
    return points(found["cons"]) if found.get("cons") else "-"


def mean_tokens(found: Summary) -> str:
    """Tokens of a reply, "-" if they are not known."""
    return "-" if found.get("tokens") is None else f"{found['tokens']:,.0f}"


def print_summaries(summaries: dict[str, Summary], console: Console) -> None:
    """A row a benchmark: sizes, score with its interval, what went wrong, the paper's numbers. Columns that would say
    nothing are left out. Where the terminal is too narrow for whole words, a few lines a benchmark."""
    rows = _result_rows(summaries)
    kept = [i for i in range(len(RESULT_COLUMNS)) if any(row[i] not in ("", "-") for row in rows)]
    table = Table(box=None, pad_edge=False)
    for i in kept:
        table.add_column(RESULT_COLUMNS[i], no_wrap=RESULT_COLUMNS[i] != "paper")
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    if sum(_least_width(RESULT_COLUMNS[i], [row[i] for row in rows]) + 2 for i in kept) - 2 <= console.width:
        console.print(table)
        return
    for row in rows:
        told = {RESULT_COLUMNS[i]: row[i] for i in kept[1:] if row[i] not in ("", "-")}
        head = ", ".join(f"{name} {told.pop(name)}" for name in ("score", "cons") if name in told)
        console.print(Text(f"{row[0]}: {head}"))
        if told:
            console.print(Padding(Text(", ".join(f"{name} {value}" for name, value in told.items())), (0, 0, 0, 4)))


def _least_width(name: str, cells: list[str]) -> int:
    """Of a column: nothing is broken but the paper's numbers, between two of them."""
    pieces = [f"{piece}," for cell in cells for piece in cell.split(", ")] if name == "paper" else cells
    return max(cell_len(piece) for piece in (name, *pieces))


def _result_rows(summaries: dict[str, Summary]) -> list[tuple[str, ...]]:
    """The cells of each benchmark, and of the parts of its score."""
    rows: list[tuple[str, ...]] = []
    for name, found in summaries.items():
        theirs = papers(found.get("kind", name)) or papers(name)
        rows.append(
            (
                name + (f" ({found['missing']:,} missing)" if found.get("missing") else ""),
                f"{found['questions']:,} x {found['samples']}",
                found["metric"],
                points(found.get("score")),
                vote(found),
                _undecided(found),
                share(found.get("truncated")),
                share(found.get("unread")),
                mean_tokens(found),
                ", ".join(f"{model} {theirs[model]:g}" for model in SHOWN_MODELS if model in theirs) or "-",
            )
        )
        for part, value in {**found.get("parts", {}), **found.get("totals", {})}.items():
            text = points(value) if isinstance(value, dict) else f"{value:.4g}"
            rows.append((f"  {part}", "", "", text, *[""] * 6))
    return rows


def _undecided(found: Summary) -> str:
    undecided = found.get("undecided") or {"count": 0}
    if not undecided["count"] or "wrong" not in undecided:
        return str(undecided["count"])
    return f"{undecided['count']} ({100 * undecided['wrong']:.1f} to {100 * undecided['right']:.1f})"


def print_result(folder: Path, console: Console) -> None:
    """One evaluation."""
    found = stored_summary(folder)
    console.print(f"{found['target']} ({folder})", markup=False, highlight=False, soft_wrap=True)
    print_summaries(found["benchmarks"], console)
    for name, summary in found["benchmarks"].items():
        for reason, count in (summary.get("undecided") or {}).get("reasons", {}).items():
            console.print(f"  {name}: {count} undecided: {reason}", markup=False, highlight=False, soft_wrap=True)
        infinite = (summary.get("score") or {}).get("error_of_infinite_samples")
        if infinite is not None:
            console.print(
                f"  {name}: standard error {100 * summary['score']['standard_error']:.1f} points; with any number of "
                f"samples it would be {100 * infinite:.1f}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def print_side_by_side(folders: Sequence[Path], console: Console) -> None:
    """Several evaluations, and the paired difference of each to the first."""
    found = [stored_summary(folder)["benchmarks"] for folder in folders]
    table = Table(box=None, pad_edge=False)
    table.add_column("benchmark")
    for folder in folders:
        table.add_column(str(folder))
    table.add_column("paper: R1")
    for name in dict.fromkeys(name for one in found for name in one):
        kinds = [one[name].get("kind", name) for one in found if name in one]
        theirs = papers(kinds[0]).get("DeepSeek-R1")
        cells = [points(one[name].get("score")) if name in one else "-" for one in found]
        table.add_row(name, *cells, "-" if theirs is None else f"{theirs:g}")
    console.print(table)
    for folder in folders[1:]:
        console.print(f"{folder} minus {folders[0]}, over the questions that both have:", highlight=False)
        console.print(difference_table(paired(folders[0], folder)))


def difference_table(differences: list[Paired]) -> Table:
    """A row a benchmark."""
    table = Table(box=None, pad_edge=False)
    for name in ("benchmark", "questions", "difference", "95 %", "p", "p (Holm)", "questions needed"):
        table.add_column(name)
    for found in differences:
        d = found.difference
        table.add_row(
            found.benchmark,
            f"{found.questions:,}",
            f"{100 * d.mean:+.1f}",
            f"{100 * d.low:+.1f} to {100 * d.high:+.1f}",
            f"{found.p:.3g}",
            f"{found.adjusted:.3g}",
            "-" if found.needed is None else f"{found.needed:,}",
        )
    return table


def print_board(run_dir: Path, console: Console) -> None:
    """The evaluations that a run made while it trained: every step, and the best and the last against the first."""
    steps, compared = run_evaluations(run_dir), cache(paired)  # paired reads all benchmarks of both
    summaries = {step: stored_summary(folder)["benchmarks"] for step, folder in steps}
    for name in dict.fromkeys(name for one in summaries.values() for name in one):
        table = Table(box=None, pad_edge=False, title=name, title_justify="left")
        for column in ("step", "score", "cons", "truncated", "tokens"):
            table.add_column(column)
        scored = {step: one[name] for step, one in summaries.items() if name in one}
        for step, found in scored.items():
            cut = share(found.get("truncated"))
            table.add_row(str(step), points(found.get("score")), vote(found), cut, mean_tokens(found))
        console.print(table)
        known = {step: found["score"]["mean"] for step, found in scored.items() if found.get("score")}
        if len(known) < 2:
            continue
        folders, first = dict(steps), min(known)
        for word, step in (("best", max(known, key=lambda step: known[step])), ("last", max(known))):
            for difference in compared(folders[first], folders[step]) if step != first else []:
                if difference.benchmark == name:
                    d = difference.difference
                    console.print(
                        f"  {word} (step {step}) minus first (step {first}): {100 * d.mean:+.1f} points, 95 % "
                        f"{100 * d.low:+.1f} to {100 * d.high:+.1f}, p {difference.p:.3g}",
                        highlight=False,
                    )


def print_list(console: Console) -> None:
    """The table of benchmarks."""
    table = Table(box=None, pad_edge=False)
    for name in ("name", "questions", "metric", "graded by", "paper: R1"):
        table.add_column(name, no_wrap=True)
    for row in BENCHMARKS:
        theirs = papers(row.name).get("DeepSeek-R1")
        table.add_row(
            row.name,
            "-" if row.published is None else f"{row.published:,}",
            row.metric,
            row.grader + (" (judge)" if row.needs_judge else ""),
            "-" if theirs is None else f"{theirs:g}",
        )
    console.print(table, "\nfiles, and the licence of their data:", highlight=False)
    for row in BENCHMARKS:
        licence = f" ({row.licence})" if row.licence else ""
        console.print(Padding(f"{row.name}: {row.wanted}{licence}", (0, 0, 0, 2)), highlight=False, markup=False)
