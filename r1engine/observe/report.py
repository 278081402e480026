"""Writes report.html, one self-contained page, from the logs of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1engine.config.read import flat
from r1engine.config.source import read_source
from r1engine.observe.charts import chart_groups, comparison
from r1engine.observe.figures import Lengths
from r1engine.observe.packed import packed
from r1engine.observe.page import compact_json, page
from r1engine.observe.put import put_text
from r1engine.observe.rated import Ratings, rated_charts
from r1engine.observe.starts import read_starts

_SAMPLE_BYTES = 16_000_000  # completions put into the page; a browser opens that at once,
_PACKED_BYTES = 5_000_000  # and the page stays under 8 MB
# key of an evaluation -> (name, is a share)
_HEADLINES = {
    "loss": ("Held-out loss", False),
    "accuracy": ("Held-out accuracy", True),
    "length_correlation": ("Correlation of score and length", False),
    "pass_at_1": ("Held-out pass@1", True),
    "format": ("Format followed", True),
    "length_mean": ("Mean response length", False),
    "truncated": ("Truncated", True),
}
_FACT_NAMES = {  # of summary.json; others are their keys
    "peak_rss_gb": "peak memory (GB)",
    "logp_diff_mean": "trainer against generator (nats)",
    "logp_diff_max": "at most",
}


def write_report(run_dir: Path, *, refresh_seconds: int | None = None) -> Path:
    """Draws what the logs of a run hold: the paper's curves, every other series, phase times, sampled completions.

    Reads metrics.jsonl and, if present, samples.jsonl, lengths.json, ratings.json, summary.json, provenance.json and
    config.yaml. The headline numbers are the first and the last evaluation in metrics.jsonl; what else summary.json
    holds is shown as facts under the title.

    Args:
        run_dir: folder of a run, finished or going on.
        refresh_seconds: of a run that goes on: the page loads itself again so often.

    Returns:
        run_dir/report.html.

    Raises:
        FileNotFoundError: metrics.jsonl is missing.
        ValueError: metrics.jsonl has no row, a log has a broken line before its last, or summary.json is broken.
    """
    rows = read_rows_of(run_dir)
    samples, num_shown, num_samples = _packed_samples(run_dir / "samples.jsonl")
    summary = _read_object(run_dir / "summary.json") if (run_dir / "summary.json").exists() else {}
    lengths = Lengths(**_read_object(run_dir / "lengths.json")) if (run_dir / "lengths.json").exists() else None
    ratings = Ratings(**_read_object(run_dir / "ratings.json")) if (run_dir / "ratings.json").exists() else None
    note = "" if num_shown == num_samples else f"Of {num_samples} logged completions, {num_shown} are shown here."
    text = page(
        run_dir.resolve().name,
        chart_groups(rows, lengths, rated_charts(ratings) if ratings else None),
        facts=_facts(rows, summary),
        headlines=_headlines(rows),
        details=_details(run_dir),
        samples=samples,
        samples_note=note,
        refresh_seconds=refresh_seconds,
    )
    html = run_dir / "report.html"
    put_text(html, text)
    return html


def write_comparison(run_dirs: list[Path], out: Path) -> Path:
    """Draws every series of several runs, a line a run, with the settings that differ and the last evaluations.

    Raises:
        FileNotFoundError, ValueError: see `write_report`; or two runs have the same folder.
    """
    names = [_short_name(run_dir, run_dirs) for run_dir in run_dirs]
    if len(set(names)) < len(names):
        raise ValueError(f"report: found {', '.join(names)}, required folders of different runs")
    runs = {name: read_rows_of(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}
    settings = [flat(_config(run_dir)) for run_dir in run_dirs]
    keys = sorted({key for one in settings for key in one if key != "run_dir"})
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]
    rows = [[key, *(json.dumps(one.get(key)) for one in settings)] for key in differing]
    last = {name: ([row for row in found if _is_evaluation(row)] or [{}])[-1] for name, found in runs.items()}
    scores = [
        [title, *(_number(last[name].get(f"eval/{key}"), is_share) for name in names)]
        for key, (title, is_share) in _HEADLINES.items()
        if any(f"eval/{key}" in row for row in last.values())
    ]
    tables = [
        {"title": "Last evaluation", "head": ["", *names], "rows": scores},
        {"title": "Settings that differ", "head": ["", *names], "rows": rows},
    ]
    text = page(" / ".join(names), comparison(runs), tables=[table for table in tables if table["rows"]])
    put_text(out, text)
    return out


def read_rows_of(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl, one a step. Errors as of `write_report`."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise FileNotFoundError(f"report: {metrics} does not exist; is {run_dir} the run_dir of a run?")
    rows = _merged(_read_lines(metrics))
    if not rows:
        raise ValueError(f"report: {metrics} has no row; the run has not finished a step")
    return rows


def _short_name(run_dir: Path, among: list[Path]) -> str:
    """The folder's name, with its parent's where another run has the same."""
    whole = run_dir.resolve()
    is_alone = [other.resolve().name for other in among].count(whole.name) == 1
    return whole.name if is_alone else f"{whole.parent.name}/{whole.name}"


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    return dict(read_source(path, []).data) if path.is_file() else {}


def _details(run_dir: Path) -> list[dict[str, str]]:
    """The starts of a run, what changed at each, and its configuration."""
    details = []
    for number, start in enumerate(read_starts(run_dir), 1):
        git = start["git"] or {}
        commit = git.get("commit", "no checkout") + (" with changes" if git.get("is_changed") else "")
        lines = [
            f"command   {' '.join(start['command'])}",
            f"folder    {start['folder']}",
            f"machine   {start['host']}, {start['ranks']} ranks",
            f"commit    {commit}",
            f"versions  {', '.join(f'{name} {version}' for name, version in start['versions'].items())}",
            *(f"changed   {change}" for change in start["changed"]),
            *(f"function  {name} {digest}" for name, digest in start.get("functions", {}).items()),
        ]
        title = f"start {number}: {start['started']}, from step {start['step']:,}"
        details.append({"title": title, "text": "\n".join(lines)})
    if (run_dir / "config.yaml").is_file():
        details.append({"title": "config.yaml", "text": (run_dir / "config.yaml").read_text(encoding="utf-8")})
    return details


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


def _packed_samples(path: Path) -> tuple[str, int, int]:
    """Completions for the page, how many they are, and how many there are; of a long run, those of evenly spaced steps
    and of the last one."""
    if not path.is_file():
        return packed("[]"), 0, 0
    rows = _read_lines(path)
    steps = sorted({row["step"] for row in rows})
    stride = max(1, -(-path.stat().st_size // _SAMPLE_BYTES))
    while True:
        kept = {*steps[::stride], *steps[-1:]}
        shown = [row for row in rows if row["step"] in kept]
        text = packed(compact_json(shown))
        if len(text) <= _PACKED_BYTES or stride >= len(steps):
            return text, len(shown), len(rows)
        stride *= -(-len(text) // _PACKED_BYTES)


def _facts(rows: list[dict], summary: dict) -> list[tuple[str, str]]:
    """What is known of the run as a whole, in one line."""
    # Without summary.json the run goes on: its iterations so far, without evaluations and checkpoints.
    seconds = summary.get("seconds") or sum(row.get("seconds/total") or 0.0 for row in rows)
    key = "tokens" if any("tokens" in row for row in rows) else "tokens_generated"
    tokens = sum(row.get(key) or 0 for row in rows)
    name = "tokens trained on" if key == "tokens" else "tokens generated"
    facts = [("steps", f"{rows[-1]['step']:,}"), (name, f"{tokens:,.0f}")]
    facts.append(("wall time", f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"))
    for key, value in summary.items():
        if (
            key in ("seconds", "steps")
            or key.endswith(("_before", "_after"))
            or not isinstance(value, (str, int, float))
        ):
            continue
        name = _FACT_NAMES.get(key, key.replace("_", " "))
        facts.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return facts


def _headlines(rows: list[dict]) -> list[dict[str, str]]:
    """Cards with the numbers of the first and the last evaluation; none before the second one."""
    evaluations = [row for row in rows if _is_evaluation(row)]
    if len(evaluations) < 2:
        return []
    before, after = evaluations[0], evaluations[-1]
    cards = []
    for key, (name, is_share) in _HEADLINES.items():
        if f"eval/{key}" not in before and f"eval/{key}" not in after:
            continue
        old, new = (_number(row.get(f"eval/{key}"), is_share) for row in (before, after))
        where = f"step {before['step']:,} \N{RIGHTWARDS ARROW} step {after['step']:,}"
        cards.append({"name": name, "old": old, "new": new, "where": where})
    return cards


def _is_evaluation(row: dict) -> bool:
    return any(key.startswith("eval/") for key in row)


def _number(value: float | None, is_share: bool) -> str:
    if not isinstance(value, (int, float)):
        return "\N{EN DASH}"
    return f"{value:.1%}" if is_share else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
