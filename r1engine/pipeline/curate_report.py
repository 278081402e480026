"""What a stage of kind `curate` tells: counts.json, Table 5 on the terminal, and a page with the filters' waterfall."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1engine.config.curate import CurateConfig
from r1engine.data.examples import Example
from r1engine.data.filters import REASONS
from r1engine.data.mixture import PAPER, statistics
from r1engine.observe.page import render

_EXCERPT = 600  # characters of a text in the report
_HEADINGS = ("domain", "rows", "rounds", "tokens mean", "p50", "p95", "paper: rows", "tokens mean")


def shown(example: Example) -> str:
    """The beginning of a row's question and of its last answer."""
    question, answer = example.question, example.messages[-1]["content"]
    return f"{_cut(question, _EXCERPT // 2)}\n\n{_cut(answer, _EXCERPT)}"


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size // 2]} ... {text[-size // 2 :]}"


def write_counts(folder: Path) -> dict[str, Any]:
    """counts.json, from data.parquet and dropped.parquet as they have been written, read again."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder / "data.parquet") as file:
        data = file.read(["domain", "method", "num_tokens", "messages.list.element.role"])
    dropped = pq.read_table(folder / "dropped.parquet", columns=["reason", "domain"])
    lists = data["messages"].to_pylist()
    rounds = [sum(message["role"] == "user" for message in messages) for messages in lists]
    domains = data["domain"].to_pylist()
    reasons = Counter(zip(dropped["reason"].to_pylist(), dropped["domain"].to_pylist(), strict=True))
    found = {reason: {d: n for (r, d), n in sorted(reasons.items()) if r == reason} for reason in REASONS}
    lines = statistics(zip(domains, rounds, data["num_tokens"].to_pylist(), strict=True))
    counts = {
        "read": len(data) + len(dropped),
        "kept": len(data),
        "dropped": {reason: by_domain for reason, by_domain in found.items() if by_domain},
        "domains": {domain: asdict(line) for domain, line in lines.items()},
        "methods": dict(sorted(Counter(data["method"].to_pylist()).items())),
    }
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return counts


def tell(cfg: CurateConfig, counts: dict[str, Any], console: Console) -> None:
    """What came of it: reasons in one line, and Table 5."""
    reasons = "  ".join(f"{reason} {sum(found.values()):,}" for reason, found in counts["dropped"].items())
    line = f"{counts['kept']:,} of {counts['read']:,} rows kept" + (f"; left out: {reasons}" if reasons else "")
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for cells in _lines(counts):
        table.add_row(*cells)
    console.print(table)
    console.print(f"data: {cfg.run_dir / 'data.parquet'}\nreport: {cfg.run_dir / 'report.html'}", highlight=False)


def _lines(counts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of Table 5: each domain, with the paper's own."""
    lines = []
    for domain, line in counts["domains"].items():
        cells = [domain, f"{line['rows']:,}", f"{line['rounds']:.1f}", f"{line['tokens_mean']:,.1f}"]
        cells += [f"{line['tokens_p50']:,.0f}", f"{line['tokens_p95']:,.0f}"]
        rows, _, tokens = PAPER.get(domain, (None, None, None))
        cells += ["" if rows is None else f"{rows:,}", "" if tokens is None else f"{tokens:,.1f}"]
        lines.append(tuple(cells))
    return lines


def write_report(
    path: Path, cfg: CurateConfig, counts: dict[str, Any], examples: dict[str, list[tuple[int, str, str, str]]]
) -> None:
    """One self-contained page.

    Args:
        path:     to write.
        cfg:      of the stage.
        counts:   counts.json.
        examples: reason -> (number, id, detail, text) of rows that were left out for it.
    """
    table = {"title": "What is kept, beside the paper's Table 5", "head": _HEADINGS, "rows": _lines(counts)}
    rows = {reason: [row[1:] for row in examples.get(reason, [])] for reason in counts["dropped"]}
    keys = ("source", "detail", "text")
    text = render(
        "curate.html",
        cfg.run_dir.name,
        facts=[("rows read", f"{counts['read']:,}"), ("kept", f"{counts['kept']:,}")],
        bars=waterfall(counts),
        table=table,
        reasons=[
            {"name": reason, "rows": [dict(zip(keys, row, strict=True)) for row in found]}
            for reason, found in rows.items()
        ],
    )
    path.write_text(text, encoding="utf-8", errors="replace")


def waterfall(counts: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of `waterfall_of` of templates/parts.html: what leaves by each filter, in their order, and what is left."""
    total, left = counts["read"], counts["read"]
    bars = []
    dropped = {reason: (sum(found.values()), found) for reason, found in counts["dropped"].items()}
    for name, (count, by_domain) in [*dropped.items(), ("kept", (counts["kept"], {}))]:
        title = ", ".join(f"{domain} {number:,}" for domain, number in by_domain.items())
        before, percent = (100 * (1 - left / total), 100 * count / total) if total else (0.0, 0.0)
        bars.append({"name": name, "title": title, "count": count, "percent": percent, "before": before})
        left -= count
    return bars
