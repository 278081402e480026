"""Writes curves.png and report.html, one self-contained page, from the logs of a run."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from r1engine.observe import figures

_SAMPLE_BYTES = 16_000_000  # completions put into the page; a browser opens that at once
# key of an evaluation -> (name, is a share)
_HEADLINES = {
    "loss": ("Held-out loss", False),
    "pass_at_1": ("Held-out pass@1", True),
    "format": ("Format followed", True),
    "length_mean": ("Mean response length", False),
    "truncated": ("Truncated", True),
}


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Draws what the logs of a run hold: the paper's curves, rewards, phase times and sampled completions.

    Reads metrics.jsonl and, if present, samples.jsonl, lengths.json and summary.json. The headline numbers are the
    first and the last evaluation in metrics.jsonl; what else summary.json holds is shown as facts under the title.

    Args:
        run_dir: folder of a run, finished or going on.

    Returns:
        (run_dir/curves.png, run_dir/report.html).

    Raises:
        FileNotFoundError: metrics.jsonl is missing.
        ValueError: metrics.jsonl has no row, a log has a broken line before its last, or summary.json is broken.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"report: {metrics} does not exist; is {run_dir} the run_dir of a run?")
    rows = _merged(_read_lines(metrics))
    if not rows:
        raise ValueError(f"report: {metrics} has no row; the run has not finished a step")
    samples, num_samples = _read_samples(run_dir / "samples.jsonl")
    summary = _read_object(run_dir / "summary.json") if (run_dir / "summary.json").exists() else {}

    png, page = run_dir / "curves.png", run_dir / "report.html"
    lengths = figures.Lengths(**_read_object(run_dir / "lengths.json")) if (run_dir / "lengths.json").exists() else None
    figures.write_png(rows, png, lengths)
    text = _page(run_dir.resolve().name, rows, samples, num_samples, summary, lengths)
    page.write_text(text, encoding="utf-8")
    return png, page


def _read_lines(path: Path) -> list[dict]:
    """Rows of a .jsonl file; a last line without its end (the run is writing it, or was killed) is left out."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"report: line {number} of {path} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f"report: line {number} of {path} has no integer `step`")
            rows.append(row)
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    """What a .json file beside the logs holds."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"report: {path} is not JSON: {error}; the report needs none, remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"report: {path} holds {found!r:.40}, required an object")
    return found


def _merged(rows: list[dict]) -> list[dict]:
    """One row a step, by step: training and evaluation may be logged apart."""
    merged: dict[int, dict] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _read_samples(path: Path) -> tuple[list[dict], int]:
    """Completions for the page and how many there are; of a long run, those of evenly spaced steps."""
    if not path.is_file():
        return [], 0
    rows = _read_lines(path)
    steps = sorted({row["step"] for row in rows})
    stride = max(1, -(-path.stat().st_size // _SAMPLE_BYTES))
    kept = {*steps[::stride], *steps[-1:]}
    return [row for row in rows if row["step"] in kept], len(rows)


def _page(
    name: str,
    rows: list[dict],
    samples: list[dict],
    num_samples: int,
    summary: dict,
    lengths: figures.Lengths | None,
) -> str:
    note = "" if len(samples) == num_samples else f"Of {num_samples} logged completions, {len(samples)} are shown here."
    parts = {
        "@TITLE@": html.escape(name),
        "@FACTS@": _facts(rows, summary),
        "@HEADLINES@": _headlines(rows),
        "@FIGURES@": _figure_cards(rows, lengths),
        "@SAMPLES_NOTE@": note,
        "@SAMPLES@": embedded_json(samples),
        "@PLOTLY@": figures.plotly_script(),
    }
    page = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    pieces = page.split("%%")  # one pass: a completion that holds the name of a part is not replaced by it
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _figure_cards(rows: list[dict], lengths: figures.Lengths | None) -> str:
    """The figures in two columns; an odd last one is as wide as both."""
    fragments = figures.html_figures(rows, lengths)
    classes = ["card figure"] * len(fragments)
    if len(fragments) % 2:
        classes[-1] += " wide"
    return "\n".join(f'<div class="{name}">{part}</div>' for name, part in zip(classes, fragments, strict=True))


def embedded_json(value: object) -> str:
    """JSON for a <script type="application/json"> element: no text in it can end the element or start another."""
    text = json.dumps(value, allow_nan=False)  # ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _facts(rows: list[dict], summary: dict) -> str:
    """What is known of the run as a whole, in one line."""
    # Without summary.json the run goes on: its iterations so far, without evaluations and checkpoints.
    seconds = summary.get("seconds") or sum(row.get("seconds/total") or 0.0 for row in rows)
    key = "tokens" if any("tokens" in row for row in rows) else "tokens_generated"
    tokens = sum(row.get(key) or 0 for row in rows)
    name = "tokens trained on" if key == "tokens" else "tokens generated"
    facts = [("steps", f"{rows[-1]['step']:,}"), (name, f"{tokens:,.0f}")]
    facts.append(("wall time", f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"))
    for key, value in summary.items():
        if key != "seconds" and not key.endswith(("_before", "_after")) and isinstance(value, (str, int, float)):
            facts.append((key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)))
    return "".join(f"<span>{html.escape(key)} <b>{html.escape(value)}</b></span>" for key, value in facts)


def _headlines(rows: list[dict]) -> str:
    """Cards with the numbers of the first and the last evaluation; none before the second one."""
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if len(evaluations) < 2:
        return ""
    before, after = evaluations[0], evaluations[-1]
    cards = []
    for key, (name, is_share) in _HEADLINES.items():
        if f"eval/{key}" not in before and f"eval/{key}" not in after:
            continue
        old, new = (_number(row.get(f"eval/{key}"), is_share) for row in (before, after))
        cards.append(
            f'<div class="card headline"><h3>{name}</h3>'
            f'<p><span class="old">{old}</span><span class="arrow">&rarr;</span><span class="new">{new}</span></p>'
            f"<small>step {before['step']:,} &rarr; step {after['step']:,}</small></div>"
        )
    return "\n".join(cards)


def _number(value: float | None, is_share: bool) -> str:
    if not isinstance(value, (int, float)):
        return "&ndash;"
    return f"{value:.1%}" if is_share else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
