"""The page of the stage `search`: accuracy at counted tokens, and the trees of one question."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from r1engine.config.searching import SearchConfig
from r1engine.hf.tokenizer import PromptTokenizer
from r1engine.observe.charts import Chart
from r1engine.observe.figures import COLORS
from r1engine.observe.page import page
from r1engine.observe.put import put_text
from r1engine.sampling.envelope import envelope_cells
from r1engine.sampling.search_rows import Row, tree_text

MOST_STEPS = 400  # of a tree in the page


def write_page(cfg: SearchConfig, rows: list[Row], table: Row, tokenizer: PromptTokenizer) -> None:
    """Write report.html.

    Args:
        cfg:       of the stage.
        rows:      of search.jsonl.
        table:     of `table_of`.
        tokenizer: of what drew the steps.
    """
    searches: dict[str, Row] = table["searches"]
    number = most_telling(rows)
    details = [
        {"title": f"{row['search']}: {row['question']}", "text": tree_text(row, tokenizer, most=MOST_STEPS)}
        for row in rows
        if row["id"] == number
    ]
    head = ["search", "accuracy", "vote", "best", "majority", "any right", "drawn", "policy run", "scorer run"]
    keys = ("accuracy", "vote", "best", "majority", "any_right", "drawn", "policy_run", "scorer_run")
    lines = [[name, *(_cell(found[key]) for key in keys)] for name, found in searches.items()]
    facts = [
        ("questions", str(max((found["questions"] for found in searches.values()), default=0))),
        ("model", str(cfg.model.path)),
        ("scorer", str(cfg.scorer.path) if cfg.scorer is not None else "none"),
        ("aggregate", cfg.search.aggregate),
    ]
    text = page(
        f"Search: {cfg.run_dir.name}",
        [("", [curves(searches, table["envelope"])])],
        facts=facts,
        tables=[{"title": "Searches; tokens of a question", "head": head, "rows": lines}, *_choices(table["envelope"])],
        details=details,
        details_title="Trees of one question",
    )
    put_text(cfg.run_dir / "report.html", text)


def _choices(envelope: list[Row]) -> list[Row]:
    """The compute-optimal choice as a table of the page, if there is one."""
    if not envelope:
        return []
    head, rows = envelope_cells(envelope)
    return [
        {"title": "Best search by difficulty, chosen on one half and judged on the other", "head": head, "rows": rows}
    ]


def curves(searches: dict[str, Row], envelope: list[Row]) -> Chart:
    """Accuracy over the tokens that a question draws, a line a method, with 95 % intervals; and the best by difficulty.

    Args:
        searches: of `table_of`.
        envelope: of `envelope_of`.
    """
    lines: dict[str, list[Row]] = {}
    for name, found in searches.items():
        if found["accuracy"] is None or not found["drawn"]:
            continue
        lines.setdefault(name.rpartition("_")[0] or name, []).append(found)
        if name.startswith("best_of"):
            lines.setdefault("majority of best_of", []).append(found | {"accuracy": found["majority"], "low": None})
    traces = []
    for (name, points), color in zip(lines.items(), cycle(COLORS), strict=False):
        points = sorted(points, key=lambda point: point["drawn"])
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [point["drawn"] for point in points],
            "y": [point["accuracy"] for point in points],
            "line": {"color": color, "width": 2},
        }
        if points[0]["low"] is not None:
            up = [point["high"] - point["accuracy"] for point in points]
            down = [point["accuracy"] - point["low"] for point in points]
            trace["error_y"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}
        traces.append(trace)
    if envelope:
        x, y = [row["budget"] for row in envelope], [row["optimal"] for row in envelope]
        line = {"color": "#888888", "dash": "dot", "width": 2}
        traces.append({"type": "scatter", "mode": "lines", "name": "best by difficulty", "x": x, "y": y, "line": line})
    layout = {
        "height": 420,
        "margin": {"l": 64, "r": 20, "t": 28, "b": 84},
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        "showlegend": True,
        "xaxis": {"type": "log", "title": {"text": "tokens drawn for a question", "standoff": 6}},
        "yaxis": {"range": [-0.03, 1.03], "title": {"text": "accuracy"}},
    }
    return {"title": "Accuracy at counted tokens", "data": traces, "layout": layout}


def most_telling(rows: list[Row]) -> int | None:
    """The question on which the searches differ most, of equal ones that with the largest trees.

    An undecided answer differs from none.
    """
    of_question: dict[int, list[Row]] = {}
    for row in rows:
        of_question.setdefault(row["id"], []).append(row)

    def worth(number: int) -> tuple[float, int]:
        right = [row["verdict"] == "right" for row in of_question[number] if row["verdict"] != "undecided"]
        share = sum(right) / max(1, len(right))
        return share * (1 - share), sum(len(row["nodes"]) for row in of_question[number])

    return max(of_question, key=worth, default=None)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value > 1 else f"{value:.3f}"
