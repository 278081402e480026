"""The figures of the report, as one PNG (matplotlib) and as interactive HTML (plotly), from the same series."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Row = dict[str, float]


@dataclass(frozen=True)
class Series:
    """One line of a figure."""

    key: str  # of metrics.jsonl
    name: str
    color: str
    is_rare: bool = False  # few points, each drawn as a marker and never smoothed


@dataclass(frozen=True)
class Figure:
    """One figure: a title, the unit of its y axis and its lines."""

    title: str
    y_label: str
    series: tuple[Series, ...]
    is_fraction: bool = False  # y axis from 0 to 1
    is_log: bool = False


BLUE, ORANGE, GREEN, GREY, RED = "#2f6fb5", "#d9731a", "#2a8c5a", "#8a94a3", "#c23b4b"
RL_FIGURES = (
    Figure(
        "Figure 2 of the paper: accuracy during training",
        "accuracy",
        (
            Series("reward/accuracy", "training questions (accuracy reward)", BLUE),
            Series("eval/pass_at_1", "held-out questions (pass@1)", ORANGE, is_rare=True),
            Series("eval/cons_at_k", "held-out questions (cons@k)", GREEN, is_rare=True),
        ),
        is_fraction=True,
    ),
    Figure(
        "Figure 3 of the paper: mean response length during training",
        "tokens per response",
        (
            Series("completion/length_mean", "training questions", BLUE),
            Series("eval/length_mean", "held-out questions", ORANGE, is_rare=True),
        ),
    ),
    Figure(
        "Reward components",
        "share of completions",
        (
            Series("reward/accuracy", "accuracy", BLUE),
            Series("reward/format", "format", GREEN),
            Series("completion/truncated", "truncated", GREY),
        ),
        is_fraction=True,
    ),
    Figure(
        "Trainer against generator: difference of log-probabilities",
        "|difference| (nats)",
        (
            Series("logp_diff/mean", "mean over tokens", BLUE),
            Series("logp_diff/max", "largest", RED),
        ),
        is_log=True,
    ),
)
SFT_FIGURES = (
    Figure(
        "Cross-entropy",
        "nats per token",
        (Series("loss", "training texts", BLUE), Series("eval/loss", "held-out texts", ORANGE, is_rare=True)),
    ),
    Figure("Entropy of the predictions", "nats per token", (Series("entropy", "training texts", BLUE),)),
    Figure("Gradient norm before clipping", "norm", (Series("grad_norm", "all parameters", BLUE),), is_log=True),
    Figure("Learning rate", "learning rate", (Series("lr", "learning rate", BLUE),)),
)
_PHASES = ("generate", "score", "logprobs", "update", "refresh")
_PHASE_COLORS = (BLUE, GREEN, "#8e6bb8", ORANGE, GREY)
_SMOOTH_FROM = 20  # points; with fewer the raw line is readable


def points(rows: list[Row], key: str, *, only_positive: bool = False) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a number under `key`.

    Args:
        rows:          metrics rows, by step.
        key:           of metrics.jsonl.
        only_positive: for a logarithmic axis.
    """
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    found = [(step, value) for step, value in found if value > 0 or not only_positive]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float]) -> list[float]:
    """Centered moving mean over about a tenth of the points; the window shrinks at both ends."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def figures_of(rows: list[Row]) -> tuple[Figure, ...]:
    """The figures of reinforcement learning, or of supervised training."""
    return RL_FIGURES if any("tokens_generated" in row or "eval/pass_at_1" in row for row in rows) else SFT_FIGURES


def write_png(rows: list[Row], path: Path) -> None:
    """Draws the figures into one PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    canvas = Canvas(figsize=(12.5, 8.0), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(canvas)
    for axes, figure in zip(canvas.subplots(2, 2).flat, figures_of(rows), strict=True):
        axes.set_title(figure.title, loc="left", fontsize=10.5, fontweight="bold", color="#1d2733", pad=8)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.set_ylabel(figure.y_label, fontsize=9)
        axes.tick_params(labelsize=8.5, colors="#4a5563", length=3)
        axes.grid(True, color="#e6eaef", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c4ccd6")
        if _draw_lines(axes, rows, figure):
            axes.legend(fontsize=8.5, frameon=False, loc="best")
        else:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=GREY)
        if figure.is_fraction:
            axes.set_ylim(-0.03, 1.03)
        elif not figure.is_log:
            axes.set_ylim(bottom=0)
    canvas.savefig(path, facecolor="white")


def _draw_lines(axes, rows: list[Row], figure: Figure) -> bool:
    """Draws the lines of one figure; False if none has a point."""
    drawn = False
    for series in figure.series:
        steps, values = points(rows, series.key, only_positive=figure.is_log)
        if not steps:
            continue
        drawn = True
        marker = "o" if series.is_rare or len(steps) < _SMOOTH_FROM else None
        if series.is_rare or len(steps) < _SMOOTH_FROM:
            axes.plot(steps, values, color=series.color, marker=marker, markersize=4, linewidth=1.8, label=series.name)
        else:
            axes.plot(steps, values, color=series.color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smoothed(values), color=series.color, linewidth=1.9, label=series.name)
    if figure.is_log and drawn:
        axes.set_yscale("log")
    return drawn


def html_figures(rows: list[Row]) -> list[str]:
    """Interactive figures as HTML fragments; the page must contain `plotly_script` before them."""
    made = {figure.title: _plotly_lines(rows, figure) for figure in figures_of(rows)}
    made["Where the time goes"] = _plotly_phases(rows)
    options = {
        "displaylogo": False,
        "responsive": True,
        "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    }
    return [
        f"<h3>{title}</h3>\n{chart.to_html(full_html=False, include_plotlyjs=False, config=options)}"
        for title, chart in made.items()
    ]


def plotly_script() -> str:
    """The JavaScript of plotly, for a page that works without a network."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _plotly_lines(rows: list[Row], figure: Figure):
    import plotly.graph_objects as go

    chart = go.Figure()
    for series in figure.series:
        steps, values = points(rows, series.key, only_positive=figure.is_log)
        if not steps:
            continue
        line = {"color": series.color, "width": 2.2}
        if series.is_rare or len(steps) < _SMOOTH_FROM:
            marker = {"size": 7, "color": series.color}
            chart.add_scatter(x=steps, y=values, name=series.name, mode="lines+markers", line=line, marker=marker)
        else:
            pale = {"color": series.color, "width": 1}
            group = {"legendgroup": series.key}
            chart.add_scatter(
                x=steps, y=values, mode="lines", line=pale, opacity=0.3, showlegend=False, hoverinfo="skip", **group
            )
            chart.add_scatter(x=steps, y=smoothed(values), name=series.name, mode="lines", line=line, **group)
    y_axis: dict = {"title": {"text": figure.y_label}}
    if figure.is_fraction:
        y_axis |= {"range": [-0.03, 1.03]}
    elif figure.is_log:
        y_axis |= {"type": "log", "exponentformat": "power", "dtick": 1}
    else:
        y_axis |= {"rangemode": "tozero"}
    return _styled(chart, y_axis)


def _plotly_phases(rows: list[Row]):
    import plotly.graph_objects as go

    chart = go.Figure()
    for phase, color in zip(_PHASES, _PHASE_COLORS, strict=True):
        steps, values = points(rows, f"seconds/{phase}")
        if steps:
            chart.add_bar(x=steps, y=values, name=phase, marker={"color": color, "line": {"width": 0}})
    chart.update_layout(barmode="stack", bargap=0)
    return _styled(chart, {"title": {"text": "seconds per iteration"}})


def _styled(chart, y_axis: dict):
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'
    chart.update_layout(
        template="plotly_white",
        font={"family": font, "size": 12.5, "color": "#36414f"},
        height=350,
        margin={"l": 64, "r": 20, "t": 28, "b": 84},
        legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
        hovermode="x unified",
        showlegend=True,
        yaxis=y_axis,
        xaxis={"title": {"text": "optimizer step", "standoff": 6}},
    )
    if not chart.data:
        chart.add_annotation(text="no data", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return chart
