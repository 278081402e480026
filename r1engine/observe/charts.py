"""The charts of a page as plotly's JSON, group by group: the named figures, and whatever else a run has logged."""

from __future__ import annotations

from itertools import cycle, pairwise
from math import ceil, floor, log10
from typing import Any

from r1engine.observe.figures import (
    BLUE,
    COLORS,
    GRADIENT_NORM,
    GREEN,
    GREY,
    LEARNING_RATE,
    LENGTHS_TITLE,
    ORANGE,
    PHASE_COLORS,
    PHASES,
    RED,
    SMOOTH_FROM,
    SPEED,
    Figure,
    Lengths,
    Row,
    Series,
    band,
    figures_of,
    points,
    smoothed,
    x_label,
)

Chart = dict[str, Any]  # title, and data and layout of plotly
Group = tuple[str, list[Chart]]  # "": without a heading
MOST_POINTS = 400  # of a line; more are means of neighbours
_TITLES = {
    "reward": "Further components of the reward",
    "logp_ratio": "Trainer against generator: share of tokens by ratio",
    "logp_diff": "Trainer against generator: KL",
    "gpu": "The first rank's GPU",
    "questions": "Questions since the start",
    "eval": "Further results of evaluations",
    "refresh": "Refresh of the generator's weights",
    "alarm": "Alarms of reward models",
    "groups": "Questions drawn again",
    "tokens_ahead": "Tokens of the next rollouts, drawn ahead",
}
_FACTS = ("step", "tokens", "tokens_generated", "tokens_trained", "texts", "nonfinite", "epoch")  # no curves

RL_GROUPS: tuple[tuple[str, tuple[Figure, ...]], ...] = (
    (
        "Rewards",
        (
            Figure(
                "Total reward",
                "weighted reward",
                (Series("reward/mean", "mean", BLUE), Series("reward/std", "spread within a question", ORANGE)),
            ),
            Figure(
                "Questions without a signal",
                "share of questions",
                (
                    Series("groups/without_signal", "all completions worth the same", RED),
                    Series("groups/all_right", "all right", GREEN),
                    Series("groups/all_wrong", "all wrong", GREY),
                ),
                is_fraction=True,
            ),
            Figure(
                "Undecided",
                "share of completions",
                (
                    Series("reward/undecided", "training questions", BLUE),
                    Series("eval/undecided", "held-out questions", ORANGE, is_rare=True),
                ),
                is_fraction=True,
            ),
        ),
    ),
    (
        "Optimization",
        (
            Figure("Loss", "loss", (Series("loss", "loss", BLUE),)),
            Figure("KL to the reference", "nats", (Series("kl", "eq. 2", BLUE),)),
            Figure("Entropy of the policy", "nats per token", (Series("entropy", "trained tokens", BLUE),)),
            GRADIENT_NORM,
            LEARNING_RATE,
            Figure("Clipped tokens", "share of tokens", (Series("clip_fraction", "outside of the clip range", BLUE),)),
            Figure("Ratio", "pi / pi_old", (Series("ratio", "mean", BLUE),)),
        ),
    ),
    (
        "Lengths and speed",
        (
            Figure(
                "Length by verdict",
                "tokens per response",
                (
                    Series("completion/length_right", "right", GREEN),
                    Series("completion/length_wrong", "wrong", RED),
                    Series("completion/length_max", "longest", GREY),
                ),
            ),
            SPEED,
            Figure(
                "Age of the weights that drew a token",
                "versions",
                (Series("staleness/mean", "mean", BLUE), Series("staleness/max", "oldest", RED)),
            ),
        ),
    ),
)


def chart_groups(rows: list[Row], lengths: Lengths | None = None, more: list[Chart] | None = None) -> list[Group]:
    """Every series of a run: the figures of its kind, then groups of further ones. Those without data are left out,
    but for the first.

    Args:
        rows:    of metrics.jsonl, one a step.
        lengths: of the texts of supervised training.
        more:    of a reward model, what is not over the steps.
    """
    first = list(figures_of(rows))
    is_rl = any(key.startswith(("reward/", "groups/")) for row in rows for key in row)
    groups: list[tuple[str, tuple[Figure, ...]]] = [*RL_GROUPS] if is_rl else []
    drawn = {series.key for _, figures in [("", first), *groups] for figure in figures for series in figure.series}
    made: list[Group] = [("", [line_chart(rows, figure) for figure in first])]
    if lengths is not None:
        made[0][1].append(_lengths_chart(lengths))
    made[0][1].extend(more or [])
    made[0][1].append(_phases_chart(rows))
    for title, figures in [*groups, *_others(rows, drawn)]:
        charts = [line_chart(rows, f) for f in figures if any(points(rows, s.key)[0] for s in f.series)]
        made += [(title, charts)] if charts else []
    return made


def _others(rows: list[Row], drawn: set[str]) -> list[tuple[str, tuple[Figure, ...]]]:
    """What no figure has: a figure for each first part of the keys."""
    keys = sorted({key for row in rows for key in row} - drawn - set(_FACTS))
    heads: dict[str, list[str]] = {}
    for key in keys:
        if not key.startswith("seconds/") and not key.endswith(("_low", "_high")):
            heads.setdefault(key.partition("/")[0] if "/" in key else key, []).append(key)
    figures = []
    for head, names in heads.items():
        colored = zip(names, cycle(COLORS), strict=False)
        lines = [Series(key, key.partition("/")[2] or key, color, key.startswith("eval/")) for key, color in colored]
        figures.append(Figure(_TITLES.get(head, head), "value", tuple(lines)))
    return [("Further series", tuple(figures))] if figures else []


def comparison(runs: dict[str, list[Row]]) -> list[Group]:
    """Every series that a run has logged, with a line a run.

    Args:
        runs: name -> rows, one a step.
    """
    keys = dict.fromkeys(key for rows in runs.values() for row in rows for key in row)
    ours = [key for key in keys if key not in _FACTS and any(points(rows, key)[0] for rows in runs.values())]
    order = ("eval", "reward", "groups", "completion", "")
    heads = {key: key.partition("/")[0] if "/" in key else "" for key in ours}
    ours.sort(key=lambda key: order.index(heads[key]) if heads[key] in order else len(order))
    groups: dict[str, list[Chart]] = {}
    for key in ours:
        traces: list[dict[str, Any]] = []
        for (name, rows), color in zip(runs.items(), cycle(COLORS), strict=False):
            traces += _traces(*points(rows, key), Series(key, name, color, key.startswith("eval/")))
        title = {"eval": "Evaluation", "reward": "Rewards", "groups": "Questions", "completion": "Completions"}
        layout = chart_layout({"title": {"text": key}})
        groups.setdefault(title.get(heads[key], heads[key] or "Optimization"), []).append(
            {"title": key, "data": traces, "layout": layout}
        )
    return list(groups.items())


def line_chart(rows: list[Row], figure: Figure) -> Chart:
    """The lines of a figure."""
    traces: list[dict[str, Any]] = []
    for series in figure.series:
        at, low, high = band(rows, series.key)
        if at:
            shape = {"type": "scatter", "x": at, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
            traces.append(shape | {"y": low, "showlegend": False})
            traces.append(shape | {"y": high, "showlegend": False, "fill": "tonexty", "fillcolor": f"{series.color}26"})
        traces += _traces(
            *points(rows, series.key, only_positive=figure.is_log, over_tokens=figure.over_tokens), series
        )
    y_axis: dict[str, Any] = {"title": {"text": figure.y_label}}
    if figure.is_fraction:
        y_axis |= {"range": [-0.03, 1.03]}
    elif figure.is_log:
        y_axis |= {"type": "log", "exponentformat": "power"} | _whole_powers(traces)
    else:
        y_axis |= {"rangemode": "tozero"} | _small(traces)
    return {"title": figure.title, "data": traces, "layout": chart_layout(y_axis, x_label(figure))}


def _whole_powers(traces: list[dict[str, Any]]) -> dict[str, Any]:
    """Marks of a logarithmic axis at powers of ten alone, where at least two are inside: plotly's choice else."""
    powers = [log10(value) for trace in traces for value in trace["y"] if value > 0]
    return {"dtick": 1} if powers and floor(max(powers)) - ceil(min(powers)) >= 1 else {}


def _small(traces: list[dict[str, Any]]) -> dict[str, Any]:
    """1e-6 where plotly writes 1 with a Greek letter, which nobody says of learning rates."""
    return {"exponentformat": "e"} if all(abs(value) < 1e-3 for trace in traces for value in trace["y"]) else {}


def _traces(steps: list[float], values: list[float], series: Series) -> list[dict[str, Any]]:
    if not steps:
        return []
    line = {"color": series.color, "width": 2.2}
    trace: dict[str, Any] = {"type": "scatter", "name": series.name, "line": line}
    if series.is_rare or len(steps) < SMOOTH_FROM:
        marker = {"size": 7 if len(steps) < 60 else 4, "color": series.color}
        return [trace | {"x": steps, "y": values, "mode": "lines+markers", "marker": marker}]
    smooth = thinned(steps, smoothed(values))
    steps, values = thinned(steps, values)
    pale = {"line": {"color": series.color, "width": 1}, "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    group = f"{series.key} {series.name}"
    return [
        trace | {"x": steps, "y": values, "mode": "lines", "legendgroup": group} | pale,
        trace | {"x": smooth[0], "y": smooth[1], "mode": "lines", "legendgroup": group},
    ]


def thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """At most so many points as a page can take, of four digits each: means of neighbours, the last point as it is."""
    size = -(-len(steps) // MOST_POINTS)
    parts = range(0, len(steps), size)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in parts)]
    return [steps[min(i + size, len(steps)) - 1] for i in parts], [float(f"{mean:.4g}") for mean in means]


def _lengths_chart(lengths: Lengths) -> Chart:
    ends = list(pairwise(lengths.edges))
    bars = {
        "type": "bar",
        "x": [low for low, _ in ends],
        "width": [high - low for low, high in ends],
        "y": lengths.texts,
        "offset": 0,
        "name": "texts",
        "marker": {"color": BLUE, "line": {"width": 0}},
    }
    layout = chart_layout({"title": {"text": "texts"}}, "tokens of a text")
    row = lengths.row_tokens
    layout["shapes"] = [
        {
            "type": "line",
            "x0": row,
            "x1": row,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": RED, "dash": "dash"},
        }
    ]
    layout["annotations"] = [
        {"text": "a packed row", "x": 1, "y": 1, "xref": "paper", "yref": "paper", "showarrow": False}
    ]
    layout["xaxis"]["type"] = "log"
    return {"title": LENGTHS_TITLE, "data": [bars], "layout": layout | {"hovermode": "closest"}}


def _phases_chart(rows: list[Row]) -> Chart:
    bars = []
    for phase, color in zip(PHASES, PHASE_COLORS, strict=True):
        steps, values = thinned(*found) if (found := points(rows, f"seconds/{phase}"))[0] else found
        if steps:
            marker = {"color": color, "line": {"width": 0}}
            bars.append({"type": "bar", "x": steps, "y": values, "name": phase, "marker": marker})
    layout = chart_layout({"title": {"text": "seconds per iteration"}}) | {"barmode": "stack", "bargap": 0}
    return {"title": "Where the time goes", "data": bars, "layout": layout}


def chart_layout(y_axis: dict[str, Any], x: str = "optimizer step") -> dict[str, Any]:
    """Without colours of text and background: the page sets those of its light or dark style."""
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'
    return {
        "font": {"family": font, "size": 12.5},
        "height": 350,
        "margin": {"l": 64, "r": 20, "t": 28, "b": 84},
        "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
        "hovermode": "x unified",
        "showlegend": True,
        "yaxis": {"automargin": True} | y_axis | {"title": {"standoff": 8} | y_axis.get("title", {})},
        "xaxis": {"title": {"text": x, "standoff": 6}},
    }
