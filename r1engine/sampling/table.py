"""The table of a pipeline's models: measures in rows, models in columns, intervals, and whether neighbours differ.

After Table 3 (stages) and Table 6 (distillation against reinforcement learning) of the paper's later version, which
prints differences of p < 0.01 in bold. Errors are over questions: the samples of one are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from r1engine.evaluation.statistics import Difference, compare, estimate, holm

Row = dict[str, Any]
SURE = 0.01  # adjusted p of a difference that is printed in bold

# Measure -> value of an answer; None: the answer has none. Shares but for the last.
MEASURES: dict[str, Callable[[Row], float | None]] = {
    "pass@1": lambda row: None if row["verdict"] == "undecided" else float(row["verdict"] == "right"),
    "format": lambda row: row["format"],
    "one language": lambda row: None if row["language"] is None else float(row["language"] == 1.0),
    "language": lambda row: row["language"],
    "truncated": lambda row: float(row["truncated"]),
    "tokens": lambda row: float(row["tokens"]),
}


def table_of(answers: dict[str, list[Row]], *, breaks: Sequence[int] = ()) -> dict[str, Any]:
    """Everything that the table shows, as JSON values.

    Args:
        answers: model -> its graded answers; the questions are the same.
        breaks:  numbers of models that are not compared with the one before.

    Returns:
        models: name -> domain ("all" too) -> measure -> mean, low, high (95 %), questions; and steps: for each model
        that has one before it, domain -> measure -> mean difference, its interval, p, adjusted by Holm over all steps
        of that measure and domain.
    """
    names = list(answers)
    domains = ["all", *sorted({row["domain"] for rows in answers.values() for row in rows})]
    scores = {name: {domain: _scores(rows, domain) for domain in domains} for name, rows in answers.items()}
    models = {
        name: {
            domain: {
                measure: _estimated(measure, list(values.values())) for measure, values in of_domain.items() if values
            }
            for domain, of_domain in scores[name].items()
        }
        for name in names
    }
    steps: dict[str, Any] = {name: {} for name in names}
    neighbours = [(names[i - 1], names[i]) for i in range(1, len(names)) if i not in breaks]
    for domain in domains:
        for measure in MEASURES:
            of_models = {name: scores[name][domain][measure] for name in names}
            for name, step in _steps(of_models, neighbours).items():
                steps[name].setdefault(domain, {})[measure] = step
    return {"models": models, "steps": steps, "breaks": list(breaks)}


def _steps(scores: dict[str, dict[int, float]], neighbours: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """How each model differs from the one before it, in one measure: model -> question -> score."""
    compared: dict[str, tuple[str, Difference]] = {}
    for before, after in neighbours:
        first, second = scores[after], scores[before]
        if len(both := sorted(first.keys() & second.keys())) >= 2:
            compared[after] = before, compare([first[q] for q in both], [second[q] for q in both])
    adjusted = holm([difference.p for _, difference in compared.values()])
    return {
        after: {"from": before, "mean": found.mean, "low": found.low, "high": found.high, "p": p}
        for (after, (before, found)), p in zip(compared.items(), adjusted, strict=True)
    }


def _scores(rows: list[Row], domain: str) -> dict[str, dict[int, float]]:
    """Measure -> question -> mean over its answers."""
    found: dict[str, dict[int, list[float]]] = {measure: {} for measure in MEASURES}
    for row in rows:
        if domain in ("all", row["domain"]):
            for measure, value_of in MEASURES.items():
                if (value := value_of(row)) is not None:
                    found[measure].setdefault(row["question"], []).append(value)
    return {measure: {q: fmean(values) for q, values in of.items()} for measure, of in found.items()}


def _estimated(measure: str, values: list[float]) -> dict[str, float]:
    if measure == "tokens":
        return {"mean": fmean(values), "questions": len(values)}
    found = estimate(values)
    return {"mean": found.mean, "low": found.low, "high": found.high, "questions": len(values)}


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown: a value, and below it the 95 % interval; bold where it differs from the model before."""
    names, parts = list(table["models"]), []
    starts = [0, *table["breaks"]]
    for start, end in zip(starts, [*table["breaks"], len(names)], strict=True):
        parts.append(_markdown(table, names[start:end]))
    legend = (
        "Each cell is a mean over questions with its 95 % interval; bold: differs from the column before it "
        f"(paired t-test over the same questions, Holm over the columns, p < {SURE}).\n"
    )
    return "\n".join([*parts, legend])


def _markdown(table: dict[str, Any], names: list[str]) -> str:
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for domain in table["models"][names[0]]:
        for measure in MEASURES:
            cells = [_cell(table, name, domain, measure) for name in names]
            if any(cells) and (measure == "pass@1" or domain == "all"):
                lines.append(f"| {measure}{'' if domain == 'all' else f', {domain}'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(table: dict[str, Any], name: str, domain: str, measure: str) -> str:
    value = table["models"][name][domain].get(measure)
    if value is None:
        return ""
    if measure == "tokens":
        return f"{value['mean']:.1f}"
    step = table["steps"][name].get(domain, {}).get(measure)
    shown = f"{100 * value['mean']:.1f}"
    shown = f"**{shown}**" if step is not None and step["p"] < SURE else shown
    return f"{shown} ({100 * value['low']:.1f} to {100 * value['high']:.1f})"
