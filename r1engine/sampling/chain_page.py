"""The stage `tiny_chain_report`: what the miniature of search found, in one table and one page."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from r1engine.config.tiny_chain import TinyChainReportConfig
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer
from r1engine.observe.charts import Chart, chart_layout
from r1engine.observe.figures import COLORS
from r1engine.observe.page import page
from r1engine.observe.put import put_json, put_text
from r1engine.observe.report import read_rows_of
from r1engine.sampling.chain_gates import gates, measures
from r1engine.sampling.chain_truth import Numbers, label_quality, of_scorer, of_trees, process_right, trained
from r1engine.sampling.search_page import curves, most_telling
from r1engine.sampling.search_rows import Row, tree_text
from r1engine.sampling.whole_lines import whole_lines

SCORERS = ("exact", "hard", "soft")
POLICIES = ("rule", "sum", "min")
ROUND = ("before", "after", "rejected")
HEADINGS = {  # first words of what was measured -> title of its table in the page
    ("labels",): "Labels of steps by rollouts, against the truth",
    ("scorer",): "Scorers of steps, by the labels that trained them",
    ("exact", "rollouts"): "Searches, by the labels of their scorer",
    ("reward",): "Training by a reward: the rule, and sum and minimum of a scorer's steps",
    ROUND: "A round of MCTS and training, beside rejection sampling",
    ("round", "reject"): "What the round and the rejection sampling drew",
}
MOST_STEPS = 200  # of a tree in the page
HACKED = 2  # completions of each hacked policy that are shown


def write_chain_page(cfg: TinyChainReportConfig) -> dict[str, Any]:
    """Write summary.json, table.md and report.html; returns what there is to tell of the round and the hacking."""
    tokenizer = load_tokenizer(cfg.trained["exact"])
    summaries = {name: json.loads((path.parent / "summary.json").read_text()) for name, path in cfg.searches.items()}
    found: dict[str, Numbers] = {"labels": label_quality(cfg.steps)} if cfg.steps is not None else {}
    found |= {f"scorer {name}": of_scorer(cfg.trained[name].parent) for name in SCORERS}
    for name in ("exact", "rollouts"):
        for search, row in summaries[name]["searches"].items():
            found[f"{name} {search}"] = {key: row[key] for key in ("vote", "best", "majority", "drawn")}
    found |= {f"reward {name}": trained(cfg.trained[name].parent) for name in POLICIES}
    found |= _round(cfg, summaries, tokenizer)
    put_json(cfg.run_dir / "summary.json", found)
    put_text(cfg.run_dir / "table.md", markdown(found))
    _write_page(cfg, found, summaries["exact"], tokenizer)
    told = {"gain before": found["before"]["MCTS"] - found["before"]["pass@1"]}
    told |= {f"pass@1 {name}": found[name]["pass@1"] for name in ROUND}
    return told | {f"accuracy {name}": found[f"reward {name}"]["accuracy last"] for name in POLICIES}


def _round(cfg: TinyChainReportConfig, summaries: dict[str, Any], tokenizer: PromptTokenizer) -> dict[str, Numbers]:
    """The round of search and training, and rejection sampling beside it."""
    found: dict[str, Numbers] = {}
    for name in ROUND:
        searches, rows = summaries[name]["searches"], [*whole_lines(cfg.searches[name])]
        whole = next(key for key in searches if key.startswith("best_of"))
        guided = next(key for key in searches if key.startswith("mcts"))
        found[name] = {
            "pass@1": searches[whole]["pass_at_1"],
            "process right": process_right([row for row in rows if row["search"] == whole], tokenizer),
            "MCTS": searches[guided]["vote"],
            **of_trees([row for row in rows if row["search"] == guided], tokenizer),
        }
    for name in ("round", "reject"):
        [row] = summaries[name]["searches"].values()
        found[name] = {"drawn": row["drawn"], "solved": row["any_right"]}
    return found


def markdown(found: dict[str, Numbers]) -> str:
    """A line a thing that was measured."""
    lines = ["| what | found |", "| --- | --- |"]
    for name, numbers in found.items():
        cells = ", ".join(f"{key} {_shown(value)}" for key, value in numbers.items())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.3f}"


def _write_page(cfg: TinyChainReportConfig, found: dict[str, Numbers], exact: Row, tokenizer: PromptTokenizer) -> None:
    rows = [*whole_lines(cfg.searches["exact"])]
    number = most_telling(rows)
    details = [
        {"title": f"{row['search']}: {row['question']}", "text": tree_text(row, tokenizer, most=MOST_STEPS)}
        for row in rows
        if row["id"] == number
    ]
    runs = {name: cfg.trained[name].parent for name in POLICIES}
    details += [{"title": f"hacked: reward {name}", "text": _completions(runs[name])} for name in ("sum", "min")]
    charts = [
        curves(exact["searches"], exact["envelope"]),
        _of_runs(runs, "reward/accuracy", "Accuracy while trained by the rule and by a PRM", "accuracy"),
        _of_runs(runs, "completion/length_mean", "Tokens of a completion", "tokens"),
    ]
    held = [[gate, "holds" if it_holds else "fails"] for gate, it_holds in gates(measures(found)).items()]
    tables = [*tables_of(found), {"title": "Gates", "head": ["", "in this run"], "rows": held}]
    text = page(
        "Search on chains of sums",
        [("", charts)],
        tables=tables,
        details=details,
        details_title="Trees of one question, and hacked completions",
    )
    put_text(cfg.run_dir / "report.html", text)


def tables_of(found: dict[str, Numbers]) -> list[dict[str, Any]]:
    """What was measured, a table a heading of `HEADINGS`; a cell that a row does not have is empty."""
    tables = []
    for names, title in HEADINGS.items():
        rows = {name: numbers for name, numbers in found.items() if name.split()[0] in names}
        keys = list(dict.fromkeys(key for numbers in rows.values() for key in numbers))
        cells = [
            [name, *(_shown(numbers[key]) if key in numbers else "" for key in keys)] for name, numbers in rows.items()
        ]
        tables += [{"title": title, "head": ["", *keys], "rows": cells}] if rows else []
    return tables


def _of_runs(runs: dict[str, Path], key: str, title: str, unit: str) -> Chart:
    """A metric of several runs over the step."""
    traces = []
    for (name, run_dir), color in zip(runs.items(), cycle(COLORS), strict=False):
        points = [(row["step"], row[key]) for row in read_rows_of(run_dir) if key in row]
        x, y = [step for step, _ in points], [value for _, value in points]
        traces.append({"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": {"color": color}})
    return {"title": title, "data": traces, "layout": chart_layout({"title": {"text": unit}, "rangemode": "tozero"})}


def _completions(run_dir: Path) -> str:
    """Of the last rollout, with what they were rewarded."""
    rows = [*whole_lines(run_dir / "samples.jsonl")][-HACKED:]
    return "\n\n".join(f"{row['question']}\n{row['completion']}\nreward {row.get('reward/process')}" for row in rows)
