"""What the rounds of `r1engine iterate` came to, beside rejection sampling at as many tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1engine.demo.tiny_chain import chain_of
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.observe.charts import Chart, chart_layout
from r1engine.observe.figures import BLUE, ORANGE
from r1engine.observe.page import page
from r1engine.observe.put import put_json, put_text
from r1engine.sampling.chain_truth import process_right
from r1engine.sampling.round_values import area_of_steps, error_to_rollouts, followed_steps, siblings_told_apart
from r1engine.sampling.search_rows import FILE
from r1engine.sampling.whole_lines import whole_lines

Row = dict[str, Any]
SHARES = {
    "pass@1": "mean share of right samples of a held-out question",
    "process right": "share of samples of which every step is right; only where the truth of steps is known",
    "search": "accuracy of MCTS that is not told what is right",
    "gain": "of the search over pass@1",
    "siblings": "of two next steps, how often that from which more completions end right has the higher value",
    "AUC": "probability that a step that leads to right ends has a higher value than one that leads to wrong ones",
    "RMSE": "value against the share of right rollouts of shared steps, without their noise; 0: less than can be told",
    "solved": "share of the questions of the training searches with a right completion",
}
TRAINED = {"search": ("search", "test"), "rejection": ("reject", "reject_test")}  # by what: stages that draw and test


def write_rounds(run_dir: Path, rounds: int, model: Path) -> str:
    """Write rounds.json, rounds.md and rounds.html of the rounds that are done; the Markdown's text.

    A row is an actor: that of the beginning, and of each round that of the search and that of rejection sampling.
    What cannot be told is None, "-" in the table: unknown is not 0. Beside SHARES it has `pairs`, the siblings that
    were compared, and `tokens`, drawn for training so far, for all questions.

    Args:
        run_dir: of the rounds.
        rounds:  how many there are to be.
        model:   folder with the tokenizer of all actors.
    """
    found: list[Row] = []
    tokens = dict.fromkeys(TRAINED, 0.0)
    for number in range(rounds + 1):
        for by, (drawing, testing) in TRAINED.items():
            tested = _tested(run_dir / f"{testing}_{number}", model)
            if tested is None:
                continue
            row = {"round": number, "trained on": by if number else "-", **tested} | ({} if number else {"tokens": 0.0})
            if (drawn := _searches(run_dir / f"{drawing}_{number}")) is not None:
                [one] = drawn.values()
                tokens[by] += one["drawn"] * one["questions"]
                row |= {"tokens": tokens[by], "solved": one["any_right"]}
            found.append(row)
    put_json(run_dir / "rounds.json", found)
    text = _markdown(found)
    put_text(run_dir / "rounds.md", text)
    put_text(run_dir / "rounds.html", _page(run_dir, found))
    return text


def _searches(folder: Path) -> dict[str, Row] | None:
    """The searches of a stage's summary, None where it is not done."""
    path = folder / "summary.json"
    searches: dict[str, Row] | None = (
        json.loads(path.read_text(encoding="utf-8"))["searches"] if path.is_file() else None
    )
    return searches


def _tested(folder: Path, model: Path) -> Row | None:
    """What a stage that tests an actor and its value model tells; None where it is not done."""
    searches = _searches(folder)
    if searches is None:
        return None
    whole = next(row for name, row in searches.items() if name.startswith("best_of"))
    guided = next(row for name, row in searches.items() if name.startswith("mcts"))
    known = {"pass@1": whole["pass_at_1"], "search": guided["accuracy"]}
    known["gain"] = None if None in known.values() else known["search"] - known["pass@1"]
    rows = [*whole_lines(folder / FILE)]
    samples = [row for row in rows if row["search"].startswith("best_of")]
    steps = followed_steps(rows)
    siblings, pairs = siblings_told_apart(steps)
    return known | {
        "process right": _process_right(model, samples),
        "siblings": siblings,
        "pairs": pairs,
        "AUC": area_of_steps(steps.values()),
        "RMSE": error_to_rollouts(followed_steps(samples).values()),
    }


def _process_right(model: Path, samples: list[Row]) -> float | None:
    """Share of samples without a wrong step; None where the questions are none whose steps are known to be right."""
    try:
        for row in samples:
            chain_of(row["question"])
    except ValueError:
        return None
    return process_right(samples, load_tokenizer(model)) if samples else None


def _cells(rounds: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table."""
    head = ["round", "trained on", *SHARES, "tokens"]
    lines = []
    for row in rounds:
        shares = {name: "-" if row.get(name) is None else f"{row[name]:.3f}" for name in SHARES}
        shares["siblings"] += f" ({row['pairs']})" if row["pairs"] else ""
        tokens = f"{row['tokens']:,.0f}" if "tokens" in row else "-"
        lines.append([str(row["round"]), row["trained on"], *shares.values(), tokens])
    return head, lines


def _markdown(rounds: list[Row]) -> str:
    head, lines = _cells(rounds)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


def _page(run_dir: Path, rounds: list[Row]) -> str:
    """A curve of each measure over the rounds, a line for what was trained on, and the table."""
    head, lines = _cells(rounds)
    names = [name for name in SHARES if any(row.get(name) is not None for row in rounds)]
    notes = [{"title": "What the measures are", "text": "\n".join(f"{name}: {SHARES[name]}" for name in SHARES)}]
    table = {"title": "Rounds; in brackets the pairs of siblings; tokens are drawn for training so far",
             "head": head, "rows": lines}  # fmt: skip
    groups = [("", [_curve(name, rounds) for name in (*names, "tokens")])]
    return page(f"Rounds: {run_dir.name}", groups, tables=[table], details=notes, details_title="Notes")


def _curve(name: str, rounds: list[Row]) -> Chart:
    traces = []
    for by, color in zip(TRAINED, (BLUE, ORANGE), strict=True):
        known = [row for row in rounds if row["trained on"] in (by, "-") and row.get(name) is not None]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": by, "line": {"color": color, "width": 2.2},
            "x": [row["round"] for row in known], "y": [row[name] for row in known],
        })  # fmt: skip
    layout = chart_layout({"title": {"text": name}, "rangemode": "tozero"}, "round")
    layout["xaxis"] |= {"dtick": 1}
    return {"title": name, "data": traces, "layout": layout}
