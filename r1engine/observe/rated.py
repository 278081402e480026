"""What `ratings.json` of a reward model's last evaluation holds, drawn for the page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from r1engine.observe.charts import Chart, chart_layout
from r1engine.observe.figures import BLUE, GREEN, GREY, RED

SCORES, LENGTHS, CALIBRATION = "Held-out scores", "Score against length", "Calibration"
_COLORS = {"chosen": GREEN, "safe": GREEN, "rejected": RED, "unsafe": RED}


@dataclass(frozen=True)
class Ratings:
    """Scores of held-out pairs or labels; `shown` of evaluation/ratings.py makes it."""

    edges: list[float]  # of the histogram; one more than there are counts
    counts: dict[str, list[int]]  # chosen and rejected, or safe and unsafe
    lengths: list[int]  # tokens, of some texts
    scores: list[float]  # of the same texts
    calibration: list[list[float]]  # of each bin: mean probability, share right, count


def rated_charts(ratings: Ratings) -> list[Chart]:
    """Histograms of both kinds of texts, score against length, how often it is right when so sure."""
    ends = list(pairwise(ratings.edges))
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": [low for low, _ in ends],
            "width": [high - low for low, high in ends],
            "y": counts,
            "offset": 0,
            "opacity": 0.6,
            "marker": {"color": _COLORS.get(name, GREY), "line": {"width": 0}},
        }
        for name, counts in ratings.counts.items()
    ]
    dots = {"type": "scatter", "mode": "markers", "name": "a text", "x": ratings.lengths, "y": ratings.scores}
    said, right, counts = ([row[i] for row in ratings.calibration] for i in range(3))
    found: dict[str, Any] = {"type": "scatter", "name": "held-out rows", "mode": "lines+markers", "x": said, "y": right}
    found |= {"text": [f"{count:.0f} rows" for count in counts], "line": {"color": BLUE}}
    ideal = {"type": "scatter", "name": "as sure as right", "mode": "lines", "x": [0.5, 1], "y": [0.5, 1]}
    calibrated = chart_layout({"title": {"text": "share right"}, "range": [-0.03, 1.03]}, "probability that it gives")
    return [
        _chart(SCORES, bars, chart_layout({"title": {"text": "texts"}}, "score") | {"barmode": "overlay"}),
        _chart(
            LENGTHS,
            [dots | {"marker": {"size": 5, "color": BLUE, "opacity": 0.5}}],
            chart_layout({"title": {"text": "score"}}, "tokens of a text"),
        ),
        _chart(CALIBRATION, [ideal | {"line": {"color": GREY, "dash": "dash"}}, found], calibrated),
    ]


def _chart(title: str, data: list[dict[str, Any]], layout: dict[str, Any]) -> Chart:
    return {"title": title, "data": data, "layout": layout | {"hovermode": "closest"}}
