"""How much of what the memory gives each row reaches, by size: a picture of files of rows.

    python benchmarks/bench_grpo_loss.py --json > rows.json
    python benchmarks/plot.py rows.json -o share.png

Rows with `of_copy` or `of_copy_rate` and a size; 1 is the floor, the time of copying as many bytes. A benchmark has an
axis of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from compare import read

SHARES = ("of_copy", "of_copy_rate")
SIZES = ("tokens", "samples", "rows")
Line = list[tuple[float, float]]  # size and share


def lines(files: list[Path]) -> dict[str, dict[str, Line]]:
    """benchmark -> row, with its direction where it has one -> sizes and shares, the smallest size first.

    Raises:
        ValueError: a line is no row, or no row has a share and a size.
    """
    found: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(list))
    for row in (row for file in files for row in read(file).values()):
        share = next((row[name] for name in SHARES if name in row), None)
        size = next((row[name] for name in SIZES if name in row), None)
        if share is None or size is None:
            continue
        about = " + backward" if row.get("backward") else ""
        found[row.get("benchmark", "")][row["row"] + about].append((size, share))
    if not found:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: found no row with a share, required {' or '.join(SHARES)} and a size")
    return {name: {row: sorted(points) for row, points in rows.items()} for name, rows in found.items()}


def draw(found: dict[str, dict[str, Line]], out: Path) -> None:
    """Write the picture; its kind is that of the ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 1, figsize=(7, 3.2 * len(found)), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[:, 0], found.items(), strict=True):
        for row, points in rows.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=row)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set(title=name, xlabel="size", ylabel="share of the copy rate", xscale="log", ylim=(0, None))
        axis.legend(fontsize="small")
    figure.savefig(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("share.png"))
    args = parser.parse_args()
    try:
        draw(lines(args.files), args.out)
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
