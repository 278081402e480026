"""The table of several runs of `make demo-search` and on how many of them each gate holds, as docs/search.md has them.

python benchmarks/search_runs.py runs/search-0 runs/search-1 ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from r1engine.sampling.chain_gates import MEASURES, gates, measures


def tables(runs: dict[str, dict[str, float]]) -> str:
    """Both tables.

    Args:
        runs: heading of a run -> its measures.
    """
    lines = [f"| measure | {' | '.join(runs)} |", "| --- |" + " --- |" * len(runs)]
    for name in MEASURES:
        cells = [f"{run[name]:.3f}" if name in run else "-" for run in runs.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| gate | holds in |", "| --- | --- |"]
    held = [gates(run) for run in runs.values()]
    lines += [f"| {gate} | {sum(run[gate] for run in held)} of {len(held)} |" for gate in held[0]]
    return "\n".join(lines)


if __name__ == "__main__":
    folders = [Path(folder) for folder in sys.argv[1:]]
    found = {folder.name: json.loads((folder / "report" / "summary.json").read_text("utf-8")) for folder in folders}
    print(tables({name: {key: round(value, 3) for key, value in measures(run).items()} for name, run in found.items()}))
