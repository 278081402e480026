"""What a run leaves at its end: summary.json, the report, and a screen of what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from r1engine.observe.report import write_report
from r1engine.observe.summary import print_summary


def tell_end(run_dir: Path, rows: list[dict[str, Any]], summary: dict[str, Any], *, has_model: bool) -> None:
    """Write and print it.

    Args:
        run_dir:   of the run.
        rows:      of metrics.jsonl.
        summary:   what summary.json holds.
        has_model: the model is exported.
    """
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report = write_report(run_dir)
    console = Console()
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    if evaluations:
        heldout = [sample for sample in samples if sample.get("heldout")][-2:]
        print_summary(evaluations[0], evaluations[-1], heldout, console=console)
    files = {"report": report, "summary": run_dir / "summary.json"}
    if has_model:
        files["model"] = run_dir / "model"
    console.print("\n".join(f"{name}: {path}" for name, path in files.items()), highlight=False)
