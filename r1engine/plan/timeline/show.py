"""A simulation as tables in a terminal, as JSON and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1engine.config import RlConfig
from r1engine.observe.charts import Chart, chart_layout
from r1engine.observe.figures import BLUE, GREEN, ORANGE, RED
from r1engine.observe.put import put_text
from r1engine.plan.timeline.costs import Guessed
from r1engine.plan.timeline.strides import Stride
from r1engine.plan.timeline.whole import Checkpoints, Choice, Span, hours_of, mean_seconds

SHOWN_LENGTHS = 8192  # of a histogram
PHASES = (("generate", BLUE), ("train", ORANGE), ("refresh", GREEN))


@dataclass(frozen=True)
class Simulation:
    """Everything that is shown."""

    cfg: RlConfig
    stretches: list[Span]
    drawn: list[list[Stride]]  # of each stretch
    staleness: list[Choice]
    generators: list[Choice]
    checkpoints: Checkpoints
    guessed: Guessed

    @property
    def count(self) -> float:
        """Strides of the run."""
        return sum(stretch.count for stretch in self.stretches)

    @property
    def hours(self) -> float:
        """Of all strides alone."""
        return hours_of(self.stretches, self.drawn)

    @property
    def whole_hours(self) -> float:
        """With checkpoints as configured, and failures."""
        return self.hours * (1 + self.checkpoints.now.life.overhead)


def to_json(simulation: Simulation) -> dict[str, Any]:
    """Every number of a simulation."""
    points = simulation.checkpoints
    return {
        "strides": simulation.count,
        "gpus": simulation.stretches[0].costs.gpus,
        "generators": simulation.stretches[0].costs.generators,
        "stride_seconds": [vars(stride) for stride in simulation.drawn[0]],
        "hours": simulation.hours,
        "hours_with_checkpoints_and_failures": simulation.whole_hours,
        "staleness": [vars(choice) for choice in simulation.staleness],
        "generators_on_own_gpus": [vars(choice) for choice in simulation.generators],
        "checkpoints": {
            "configured_strides": points.configured,
            "best_strides": points.best.every,
            "daly_strides": points.daly_strides,
            "hours_between_failures": points.between_failures / 3600,
            "overhead": {saving.every: saving.life.overhead for saving in points.found},
        },
        "guessed": vars(simulation.guessed),
    }


def facts(simulation: Simulation) -> list[tuple[str, str]]:
    """Name and value of what stands at the top."""
    drawn, costs, now = simulation.drawn[0], simulation.stretches[0].costs, simulation.checkpoints.now
    parts = ", ".join(f"{name} {sum(getattr(s, name) for s in drawn) / len(drawn):,.1f}" for name, _ in PHASES)
    busy = sum(stride.busy for stride in drawn) / len(drawn)
    return [
        ("strides", f"{simulation.count:,.0f}"),
        ("GPUs", f"{costs.gpus}, {costs.generators} generators of {costs.slots} slots"),
        ("a stride", f"{mean_seconds(drawn):,.1f} s: {parts}; the slots draw {busy:.0%} of the time"),
        ("all strides", f"{simulation.hours:,.1f} h, {simulation.hours * costs.gpus:,.0f} GPU hours"),
        (
            f"with checkpoints every {now.every} strides and failures every "
            f"{simulation.checkpoints.between_failures / 3600:,.1f} h",
            f"{simulation.whole_hours:,.1f} h ({now.life.overhead:+.1%})",
        ),
    ]  # fmt: skip


def tables(simulation: Simulation) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each."""
    found = []
    head = ["", "s a stride", "slots that draw", "h", "GPU hours", ""]
    for title, choices in (("How far ahead", simulation.staleness), ("How many generators", simulation.generators)):
        if choices:
            rows = [
                [c.name, f"{c.seconds:,.1f}", f"{c.busy:.0%}", f"{c.hours:,.1f}", f"{c.hours * c.gpus:,.0f}", _mark(c)]
                for c in choices
            ]
            found.append((title, head, rows))
    points = simulation.checkpoints
    rows = [
        [
            f"{s.every}", f"{s.life.saving:,.2f}", f"{s.life.lost:,.2f}", f"{s.life.overhead:.2%}",
            "configured" if s.every == points.configured else "least" if s is points.best else "",
        ]
        for s in points.found
    ]  # fmt: skip
    title = f"How often to save (Daly's optimum: every {points.daly_strides:,.1f} strides)"
    return [*found, (title, ["every ... strides", "h of saving", "h lost", "in all", ""], rows)]


def _mark(choice: Choice) -> str:
    return "configured" if choice.is_configured else ""


def print_simulation(simulation: Simulation, console: Console) -> None:
    """Facts and tables."""
    for name, value in facts(simulation):
        console.print(f"{name}: {value}", highlight=False)
    for title, head, rows in tables(simulation):
        table = Table(title=title, title_justify="left", box=None)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i in (0, len(head) - 1) else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if not simulation.staleness:
        console.print("generators on the trainer's GPUs draw nothing while it works: no staleness helps")
    guessed = ", ".join(f"{name} {value:g}" for name, value in vars(simulation.guessed).items())
    console.print(f"[dim]guessed: {guessed}[/]")


# ---------------------------------------------------------------------- the page


def write_page(simulation: Simulation, path: Path) -> None:
    """One self-contained page with the tables and figures."""
    from r1engine.observe.page import page

    groups = [("", [_stride_chart(simulation), _length_chart(simulation)])]
    choices = [("How far ahead", simulation.staleness), ("How many generators", simulation.generators)]
    drawn = [_choice_chart(title, found) for title, found in choices if found]
    groups.append(("", [*drawn, _saving_chart(simulation)]))
    shown = [{"title": title, "head": head, "rows": rows} for title, head, rows in tables(simulation)]
    text = page(f"{simulation.cfg.run_dir.name} on paper", groups, facts=facts(simulation), tables=shown)
    put_text(path, text)


def _stride_chart(simulation: Simulation) -> Chart:
    at = list(range(1, len(simulation.drawn[0]) + 1))
    bars = [
        {
            "type": "bar", "name": name, "x": at, "y": [round(getattr(s, name), 2) for s in simulation.drawn[0]],
            "marker": {"color": color, "line": {"width": 0}},
        }
        for name, color in PHASES
    ]  # fmt: skip
    layout = chart_layout({"title": {"text": "seconds"}}, "stride") | {"barmode": "stack"}
    return {"title": "Where the time goes", "data": bars, "layout": layout}


def _length_chart(simulation: Simulation) -> Chart:
    lengths = list(islice(simulation.stretches[0].lengths(), SHOWN_LENGTHS))
    bars = {"type": "histogram", "x": [round(length) for length in lengths], "name": "completions", "nbinsx": 60}
    layout = chart_layout({"title": {"text": "completions"}}, "tokens") | {"hovermode": "closest"}
    return {"title": "Lengths", "data": [bars | {"marker": {"color": BLUE}}], "layout": layout}


def _choice_chart(title: str, choices: list[Choice]) -> Chart:
    names = [choice.name for choice in choices]
    data = [
        {
            "type": "bar", "x": names, "y": [round(c.hours, 2) for c in choices], "name": "hours of the run",
            "marker": {"color": BLUE},
        },
        {
            "type": "scatter", "x": names, "y": [round(c.hours * c.gpus) for c in choices], "name": "GPU hours",
            "yaxis": "y2", "mode": "lines+markers", "line": {"color": ORANGE},
        },
    ]  # fmt: skip
    layout = chart_layout({"title": {"text": "hours"}, "rangemode": "tozero"}, "")
    layout["yaxis2"] = {"title": {"text": "GPU hours"}, "overlaying": "y", "side": "right", "rangemode": "tozero"}
    return {"title": title, "data": data, "layout": layout}


def _saving_chart(simulation: Simulation) -> Chart:
    points = simulation.checkpoints
    at = [saving.every for saving in points.found]
    run = [(s.life.hours - s.life.lost - s.life.saving) / 100 for s in points.found]
    shares = [
        ("saving", [s.life.saving for s in points.found], BLUE),
        ("lost", [s.life.lost for s in points.found], RED),
    ]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "all", "name": name, "x": at, "line": {"color": color},
            "y": [round(value / of, 3) for value, of in zip(values, run, strict=True)],
        }
        for name, values, color in shares
    ]  # fmt: skip
    layout = chart_layout(
        {"title": {"text": "% of the strides' hours"}, "rangemode": "tozero"}, "strides between checkpoints"
    )
    layout["xaxis"]["type"] = "log"
    layout["shapes"] = [
        {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": color, "dash": "dash"}}
        for x, color in ((points.daly_strides, GREEN), (points.configured, ORANGE))
    ]
    layout["annotations"] = [
        {
            "text": "green: Daly's optimum; orange: as configured", "x": 1, "y": 1, "xref": "paper", "yref": "paper",
            "showarrow": False,
        }
    ]  # fmt: skip
    return {"title": "How often to save", "data": data, "layout": layout}
