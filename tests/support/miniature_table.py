"""The table of docs/pipeline.md from runs of `make demo-r1`, a seed each:

python tests/support/miniature_table.py runs/demo-r1 runs/demo-r1-seed1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SUMS = ("two digits", "three digits")
COLUMNS = ("two digits", "three digits", "one language", "readable", "general", "unsafe")


def percent(domains: dict[str, Any], names: tuple[str, ...], metric: str) -> float:
    """Of the mean over the questions of some domains."""
    found = [domains[name][metric] for name in names]
    return 100 * sum(cell["mean"] * cell["questions"] for cell in found) / sum(cell["questions"] for cell in found)


def row(domains: dict[str, Any]) -> list[float]:
    """One model's percentages, in the order of COLUMNS."""
    return [
        percent(domains, ("two digits",), "pass@1"),
        percent(domains, ("three digits",), "pass@1"),
        percent(domains, SUMS, "one language"),
        percent(domains, SUMS, "format"),
        percent(domains, ("general",), "pass@1"),
        percent(domains, ("safety",), "pass@1"),
    ]


def main(folders: list[str]) -> None:
    runs = [json.loads((Path(folder) / "table" / "table.json").read_text())["models"] for folder in folders]
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for model in runs[0]:
        cells = zip(*[row(run[model]) for run in runs], strict=True)
        print(f"| {model} | {' | '.join(' / '.join(f'{value:.1f}' for value in cell) for cell in cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
