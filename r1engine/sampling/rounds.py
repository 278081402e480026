"""What the rounds of `r1engine iterate` came to, beside rejection sampling at as many tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1engine.observe.put import put_json, put_text

Row = dict[str, Any]
COLUMNS = ("pass@1", "MCTS", "gain", "AUC", "tokens", "solved", "rejection: pass@1", "rejection: tokens")


def write_rounds(run_dir: Path, rounds: int) -> str:
    """Write rounds.json and rounds.md of the rounds that are done; the latter's text.

    - pass@1: of held-out questions, the mean share of right samples; MCTS: accuracy of a search that is not told what
      is right, and its gain over pass@1.
    - AUC: the probability that the value model puts a right completion of that search above a wrong one.
    - tokens: drawn for training so far, for all questions; solved: share of the questions with a right completion.
    """
    found: list[Row] = []
    tokens = {"search": 0.0, "reject": 0.0}
    for number in range(rounds + 1):
        test = _searches(run_dir / f"test_{number}")
        if test is None:
            break
        row = _tested(test)
        for kind, name in (("search", "tokens"), ("reject", "rejection: tokens")):
            drawn = _searches(run_dir / f"{kind}_{number}")
            if drawn is not None:
                [one] = drawn.values()
                tokens[kind] += one["drawn"] * one["questions"]
                row |= {name: tokens[kind]} | ({"solved": one["any_right"]} if kind == "search" else {})
        if (rejected := _searches(run_dir / f"reject_test_{number}")) is not None:
            row["rejection: pass@1"] = _tested(rejected)["pass@1"]
        found.append(row)
    put_json(run_dir / "rounds.json", found)
    text = _markdown(found)
    put_text(run_dir / "rounds.md", text)
    return text


def _searches(folder: Path) -> dict[str, Row] | None:
    """The searches of a stage's summary, None where it is not done."""
    path = folder / "summary.json"
    searches: dict[str, Row] | None = (
        json.loads(path.read_text(encoding="utf-8"))["searches"] if path.is_file() else None
    )
    return searches


def _tested(searches: dict[str, Row]) -> Row:
    whole = next(row for name, row in searches.items() if name.startswith("best_of"))
    guided = next(row for name, row in searches.items() if name.startswith("mcts"))
    known = {"pass@1": whole["pass_at_1"], "MCTS": guided["accuracy"], "AUC": guided["auc"]}
    gain = None if None in (known["pass@1"], known["MCTS"]) else known["MCTS"] - known["pass@1"]
    return known | {"gain": gain}


def _markdown(rounds: list[Row]) -> str:
    lines = [f"| round | {' | '.join(COLUMNS)} |", "|" + " --- |" * (1 + len(COLUMNS))]
    for number, row in enumerate(rounds):
        lines.append(f"| {number} | {' | '.join(_shown(row.get(name)) for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value > 1 else f"{value:.3f}"
