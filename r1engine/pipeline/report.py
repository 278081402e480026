"""The page of a pipeline: its stages as a graph with state, time and counts, the filters' waterfalls, and the table."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from r1engine.config import CurateConfig, EvaluateConfig
from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.observe.page import render
from r1engine.observe.put import put_text
from r1engine.pipeline import manifest
from r1engine.pipeline.curate_report import waterfall
from r1engine.pipeline.status import short_counts

if TYPE_CHECKING:
    from markupsafe import Markup

NAME = "report.html"  # of the pipeline's folder, and of every stage that has one
_ROW, _ARCS = 30, 200  # CSS pixels: height of a stage's line in base.html, width of the arcs' column
_Done = dict[str, manifest.Manifest | None]


def write_report(pipeline: Pipeline) -> None:
    """Write the page into the folder of the pipeline; what is not done yet stands in grey.

    Raises:
        ConfigError: a manifest is broken.
    """
    done = {stage.name: manifest.read(stage.cfg.run_dir) for stage in pipeline.stages}
    seconds = sum(found.seconds for found in done.values() if found is not None)
    finished = sum(found is not None for found in done.values())
    text = render(
        "pipeline.html",
        str(pipeline.run_dir),
        facts=[("stages done", f"{finished} of {len(done)}"), ("time", f"{seconds:,.0f} s")],
        graph=_graph(pipeline, done),
        stages=[_line(stage, done[stage.name]) for stage in pipeline.stages],
        parts=[part for stage in pipeline.stages if done[stage.name] is not None for part in _parts(stage)],
    )
    put_text(pipeline.run_dir / NAME, text)


def _line(stage: PlannedStage, found: manifest.Manifest | None) -> dict[str, Any]:
    return {
        "name": stage.name,
        "kind": stage.cfg.stage,
        "page": f"{stage.name}/{NAME}" if (stage.cfg.run_dir / NAME).is_file() else None,
        "is_done": found is not None,
        "seconds": "" if found is None else f"{found.seconds:,.1f} s",
        "told": "to run" if found is None else short_counts(found.counts),
    }


def _graph(pipeline: Pipeline, done: _Done) -> dict[str, Any]:
    """A dot for each stage, and arcs from what it is made from."""
    heights = {stage.name: round((i + 0.5) * _ROW) for i, stage in enumerate(pipeline.stages)}
    arcs, right = [], _ARCS - 10
    for stage in pipeline.stages:
        for key, needed in stage.needs.items():
            start, to = heights[needed], heights[stage.name]
            bend = round(_ARCS - 14 - min(_ARCS - 20, 10 + 0.45 * (to - start)))
            path = f"M{right} {start} C{bend} {start} {bend} {to} {right} {to}"
            is_done = done[stage.name] is not None
            arcs.append({"path": path, "title": f"{needed}: {key} of {stage.name}", "is_done": is_done})
    dots = [{"y": y, "is_done": done[name] is not None} for name, y in heights.items()]
    return {"width": _ARCS, "height": len(heights) * _ROW, "arcs": arcs, "dots": dots}


def _parts(stage: PlannedStage) -> list[dict[str, Any]]:
    """What the page shows of a finished stage, if anything."""
    if isinstance(stage.cfg, EvaluateConfig):
        text = (stage.cfg.run_dir / stage.cfg.MAKES["page"]).read_text(encoding="utf-8")
        return [{"title": stage.name, "blocks": _blocks(text), "bars": []}]
    if isinstance(stage.cfg, CurateConfig):
        counts = json.loads((stage.cfg.run_dir / stage.cfg.MAKES["counts"]).read_text(encoding="utf-8"))
        return [{"title": f"{stage.name}: what left, and why", "blocks": [], "bars": waterfall(counts)}]
    return []


def _blocks(markdown: str) -> list[dict[str, Any]]:
    """The tables of a page in Markdown, and its other lines."""
    blocks: list[dict[str, Any]] = []
    for block in markdown.strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not re.fullmatch(r"[|-]+", line)]
        if not lines or not lines[0].startswith("|"):
            blocks.append({"text": _bold(block)})
            continue
        head, *rows = [[_bold(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
        blocks.append({"text": "", "title": "", "head": head, "rows": rows})
    return blocks


def _bold(text: str) -> Markup:
    from markupsafe import escape

    escaped = escape(text)
    return type(escaped)(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped))
