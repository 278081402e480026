"""What a stage of kind `curate` tells: counts.json, Table 5 on the terminal, and a page with the filters' waterfall."""

from __future__ import annotations

import html
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

_EXCERPT = 600  # characters of a text in the report
_HEADINGS = ("domain", "rows", "rounds", "tokens mean", "p50", "p95", "paper: rows", "tokens mean")
# Narrow screens scroll what is wide; colours of text and page are the browser's, light or dark.
HEAD = (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<meta name=color-scheme content='light dark'>"
)
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;overflow-wrap:anywhere}
.wide,table{display:block;overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}
.bar{display:inline-block;height:1em;background:#4472c4}.bar.kept{background:#3a9d5d}pre{white-space:pre-wrap;
background:#8881;padding:.6em;margin:.3em 0}summary{cursor:pointer}.detail{opacity:.7}"""


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
    head = "".join(f"<th>{html.escape(text)}</th>" for text in _HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _lines(counts)
    )
    details = "".join(_example_block(reason, examples.get(reason, [])) for reason in counts["dropped"])
    title = html.escape(cfg.run_dir.name)
    path.write_text(
        f"{HEAD}<title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{counts['kept']:,} of {counts['read']:,} rows are kept.</p>"
        f"<h2>Filters, in order</h2><table>{waterfall(counts)}</table>"
        f"<h2>What is kept, beside the paper's Table 5</h2><table><tr>{head}</tr>{body}</table>"
        f"<h2>Rows that were left out</h2>{details}</html>\n",
        encoding="utf-8",
        errors="replace",
    )


def waterfall(counts: dict[str, Any]) -> str:
    """Rows of a table of HTML: what leaves by each filter, in their order, and what is left."""
    left, bars = counts["read"], []
    for reason, by_domain in counts["dropped"].items():
        here = sum(by_domain.values())
        title = ", ".join(f"{domain} {count:,}" for domain, count in by_domain.items())
        bars.append(_bar(reason, title, here, left, counts["read"]))
        left -= here
    return "".join([*bars, _bar("kept", "", left, left, counts["read"])])


def _bar(name: str, title: str, count: int, left: int, total: int) -> str:
    """A line of the waterfall: behind what is gone before, as wide as what goes here."""
    before, wide = (100 * (1 - left / total), 100 * count / total) if total else (0.0, 0.0)
    is_kept = " kept" if name == "kept" else ""
    return (
        f"<tr title='{html.escape(title)}'><td>{html.escape(name)}</td><td>{count:,}</td><td>{wide:.1f} %</td>"
        f"<td style='width:40em;text-align:left'><span class='bar{is_kept}' "
        f"style='margin-left:{before:.2f}%;width:{wide:.2f}%'></span></td></tr>"
    )


def _example_block(reason: str, found: list[tuple[int, str, str, str]]) -> str:
    rows = "".join(
        f"<p><b>{html.escape(source)}</b> <span class=detail>{html.escape(detail)}</span></p>"
        f"<pre>{html.escape(text)}</pre>"
        for _, source, detail, text in found
    )
    return f"<details><summary>{html.escape(reason)}</summary>{rows}</details>"
