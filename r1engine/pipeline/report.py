"""The page of a pipeline: its stages as a graph with state, time and counts, the filters' waterfalls, and the table."""

from __future__ import annotations

import html
import json
import re

from r1engine.config import CurateConfig, EvaluateConfig
from r1engine.config.pipeline import Pipeline
from r1engine.observe.put import put_text
from r1engine.pipeline import manifest
from r1engine.pipeline.curate_report import HEAD, STYLE, waterfall
from r1engine.pipeline.status import short_counts

NAME = "report.html"  # of the pipeline's folder, and of every stage that has one
_ROW, _ARCS = 26, 220  # pixels: height of a stage's line, width of the arrows' column
_COLUMNS = (0, 170, 280, 350)  # of name, kind, seconds and counts


def write_report(pipeline: Pipeline) -> None:
    """Write the page into the folder of the pipeline; what is not done yet stands in grey.

    Raises:
        ConfigError: a manifest is broken.
    """
    done = {stage.name: manifest.read(stage.cfg.run_dir) for stage in pipeline.stages}
    seconds = sum(found.seconds for found in done.values() if found is not None)
    finished = sum(found is not None for found in done.values())
    title = html.escape(str(pipeline.run_dir))
    parts = [
        f"{HEAD}<title>{title}</title>",
        f"<style>{STYLE}svg text{{font-size:13px;fill:currentColor}}svg a{{fill:#4a8fe0}}</style><h1>{title}</h1>",
        f"<p>{finished} of {len(done)} stages are done, in {seconds:,.0f} s; lines join what is made from what.</p>",
        _graph(pipeline, done),
    ]
    for stage in pipeline.stages:
        if done[stage.name] is None:
            continue
        if isinstance(stage.cfg, EvaluateConfig):
            text = (stage.cfg.run_dir / stage.cfg.MAKES["page"]).read_text(encoding="utf-8")
            parts.append(f"<h2>{html.escape(stage.name)}</h2>{_tables(text)}")
        if isinstance(stage.cfg, CurateConfig):
            counts = json.loads((stage.cfg.run_dir / stage.cfg.MAKES["counts"]).read_text(encoding="utf-8"))
            parts.append(f"<h2>{html.escape(stage.name)}: what left, and why</h2><table>{waterfall(counts)}</table>")
    put_text(pipeline.run_dir / NAME, "".join(parts) + "</html>\n")


def _graph(pipeline: Pipeline, done: dict[str, manifest.Manifest | None]) -> str:
    """An SVG: a line for each stage, and arcs from what it is made from."""
    heights = {stage.name: (i + 0.5) * _ROW for i, stage in enumerate(pipeline.stages)}
    pieces = []
    for stage in pipeline.stages:
        to, found = heights[stage.name], done[stage.name]
        for key, needed in stage.needs.items():
            start = heights[needed]
            bend = _ARCS - 14 - min(_ARCS - 20, 10 + 0.45 * (to - start))
            pieces.append(
                f"<path d='M{_ARCS - 10} {start} C{bend:.0f} {start} {bend:.0f} {to} {_ARCS - 10} {to}' fill=none "
                f"stroke='#{'7a9cc6' if found else 'ccc'}'><title>{html.escape(f'{needed}: {key} of {stage.name}')}"
                "</title></path>"
            )
        name = html.escape(stage.name)
        if (stage.cfg.run_dir / NAME).is_file():
            name = f"<a href='{name}/{NAME}'>{name}</a>"
        cells = (name, stage.cfg.stage, f"{found.seconds:,.1f} s" if found else "", _told(found))
        pieces.append(f"<circle cx={_ARCS - 6} cy={to} r=4 fill='#{'3a9d5d' if found else 'bbb'}'/>")
        for column, cell in zip(_COLUMNS, cells, strict=True):
            color = "" if found else " opacity=.6"
            pieces.append(f"<text x={_ARCS + 6 + column} y={to + 4}{color}>{cell}</text>")
    height = len(heights) * _ROW
    svg = f"<svg xmlns='http://www.w3.org/2000/svg' width=1200 height={height}>{''.join(pieces)}</svg>"
    return f"<div class=wide>{svg}</div>"


def _told(found: manifest.Manifest | None) -> str:
    return "to run" if found is None else html.escape(short_counts(found.counts))


def _tables(markdown: str) -> str:
    """The tables of a page in Markdown, and its other lines."""
    pieces = []
    for block in markdown.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not re.fullmatch(r"[|-]+", line)]
        if not lines or not lines[0].startswith("|"):
            pieces.append(f"<p>{html.escape(block)}</p>")
            continue
        rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
        tag = "th"
        pieces.append("<table>")
        for row in rows:
            pieces.append("<tr>" + "".join(f"<{tag}>{_bold(cell)}</{tag}>" for cell in row) + "</tr>")
            tag = "td"
        pieces.append("</table>")
    return "".join(pieces)


def _bold(cell: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", cell)
