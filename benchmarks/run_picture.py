"""The first figures of a run as a picture, as the README has them.

    python benchmarks/run_picture.py runs/demo/r1_zero -o docs/demo.png

The report of a run draws all of them; this is for where no HTML can stand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from r1engine.observe.figures import SMOOTH_FROM, Figure, Row, figures_of, points, smoothed, x_label
from r1engine.observe.report import read_rows_of


def draw(rows: list[Row], out: Path, count: int) -> None:
    """Write the picture; its kind is that of the ending.

    Args:
        rows:  of metrics.jsonl, one a step.
        out:   the file.
        count: of figures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, places = pyplot.subplots(1, count, figsize=(7 * count, 4.4), dpi=100, squeeze=False, layout="constrained")
    for axes, figure in zip(places.flat, figures_of(rows), strict=False):
        axes.set_title(figure.title, loc="left", fontweight="bold")
        axes.set(xlabel=x_label(figure), ylabel=figure.y_label)
        axes.grid(True, color="#e6eaef")
        axes.spines[["top", "right"]].set_visible(False)
        _draw_lines(axes, rows, figure)
        axes.set_ylim(*((-0.03, 1.03) if figure.is_fraction else (0, None)))
        axes.legend(frameon=False)
    canvas.savefig(out)


def _draw_lines(axes: Any, rows: list[Row], figure: Figure) -> None:
    for series in figure.series:
        steps, values = points(rows, series.key, over_tokens=figure.over_tokens)
        if not steps:
            continue
        if series.is_rare or len(steps) < SMOOTH_FROM:
            axes.plot(steps, values, color=series.color, marker="o", label=series.name)
        else:
            axes.plot(steps, values, color=series.color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, smoothed(values), color=series.color, linewidth=2, label=series.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("run.png"))
    parser.add_argument("--figures", type=int, default=2, metavar="COUNT")
    args = parser.parse_args()
    try:
        draw(read_rows_of(args.run_dir), args.out, args.figures)
    except (OSError, ValueError) as error:
        print(f"run_picture: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
