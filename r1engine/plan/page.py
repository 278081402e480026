"""The page of a plan: memory and time of the layout, and the ranking of a search, in the template of all pages."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from r1engine.observe.charts import Chart, Group, chart_layout
from r1engine.observe.figures import COLORS, RED
from r1engine.observe.page import page
from r1engine.observe.put import put_text
from r1engine.plan.memory import PHASE_TERMS
from r1engine.plan.planner import Plan
from r1engine.plan.show import memory_table, ranking_table, time_table, unit_of

_COLORS = {
    "weights": "#2f6fb5",
    "generator weights": "#2f6fb5",
    "gradients": "#d9731a",
    "optimizer": "#2a8c5a",
    "activations": "#8a5fb5",
    "reference": "#6fb0d9",
    "KV pool": "#8a94a3",
    "keys and values": "#8a94a3",
    "logits": "#c23b4b",
    "MoE buffers": "#d9b31a",
    "refresh buckets": "#5ab5a0",
    "runtime": "#c0c6cf",
}


def write_html(plan: Plan, ranking: list[Plan], model: str, path: Path) -> None:
    """Write one self-contained page.

    Args:
        plan:    that is shown.
        ranking: what a search has found, the best first; none without a search.
        model:   its name, for the title.
        path:    of the page.
    """
    phase, gib = plan.peak
    facts = [
        ("layout", plan.layout.describe()),
        ("fits", "yes" if plan.fits else "no: " + "; ".join(plan.limits())),
        ("peak", f"{gib:.1f} of {plan.gpu.memory_gib} GiB, in {phase}"),
        (unit_of(plan), f"{plan.seconds:,.0f} s"),
        ("tokens/s a GPU", f"{plan.tokens_per_second_per_gpu:,.1f}"),
    ]
    tables = [_cells(memory_table(plan)), _cells(time_table(plan))]
    tables += [_cells(ranking_table(ranking))] if ranking else []
    memory = [_memory_chart(plan, *phase) for phase in PHASE_TERMS.items() if getattr(plan.worst, phase[1])]
    groups: list[Group] = [("Memory by pipeline stage", memory), ("Time", [_time_chart(plan)])]
    text = page(f"{model} on {plan.layout.gpus} x {plan.gpu.name.upper()}", groups, facts=facts, tables=tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    put_text(path, text)


def _memory_chart(plan: Plan, phase: str, terms: str) -> Chart:
    stages = list(range(len(plan.stages)))
    bars = {name: [getattr(stage, terms)[name] for stage in plan.stages] for name in getattr(plan.stages[0], terms)}
    limit = {"dash": "dash", "color": RED, "width": 1.5}
    line = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": plan.gpu.memory_gib, "y1": plan.gpu.memory_gib}
    layout = _stacked("GiB", "pipeline stage") | {"shapes": [line | {"line": limit}]}
    layout["xaxis"] |= {"dtick": max(1, len(stages) // 16)}
    return {"title": phase, "data": [_bar(name, stages, heights) for name, heights in bars.items()], "layout": layout}


def _time_chart(plan: Plan) -> Chart:
    phases = [phase.name for phase in plan.phases]
    causes = dict.fromkeys(name for phase in plan.phases for name, s in phase.seconds.items() if s >= 0.05)
    bars = [
        _bar(name, phases, [phase.seconds.get(name, 0.0) for phase in plan.phases], color)
        for name, color in zip(causes, cycle(COLORS), strict=False)
    ]
    return {"title": f"Seconds of {unit_of(plan)}", "data": bars, "layout": _stacked("s", "phase")}


def _bar(name: str, x: list[Any], heights: list[float], color: str = "") -> dict[str, Any]:
    found = _COLORS.get(name, color)
    y = [round(height, 3) for height in heights]
    return {"type": "bar", "name": name, "x": x, "y": y, **({"marker": {"color": found}} if found else {})}


def _stacked(unit: str, x: str) -> dict[str, Any]:
    return chart_layout({"title": {"text": unit}}, x) | {"barmode": "stack", "legend": {"orientation": "h", "y": -0.3}}


def _cells(table: Table) -> dict[str, Any]:
    """A table of the terminal as the page's template takes it."""
    columns = [[Text.from_markup(str(cell)).plain for cell in column.cells] for column in table.columns]
    head = [Text.from_markup(str(column.header)).plain for column in table.columns]
    return {"title": str(table.title), "head": head, "rows": [list(row) for row in zip(*columns, strict=True)]}
