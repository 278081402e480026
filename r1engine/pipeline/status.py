"""What of a pipeline is done: a table without torch."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from r1engine.config import ConfigError
from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.pipeline import manifest


def print_status(pipeline: Pipeline) -> None:
    """One line a stage: kind, state, seconds, what it tells, the digest of what it made."""
    table = Table(box=None)
    for column in ("stage", "kind", "state", "seconds", "counts", "sha256"):
        table.add_column(column)
    for stage in pipeline.stages:
        table.add_row(stage.name, stage.cfg.stage, *_told(stage))
    Console().print(table)


def _told(stage: PlannedStage) -> tuple[str, str, str, str]:
    """State, seconds, counts, digest of a stage."""
    done = manifest.read(stage.cfg.run_dir)
    if done is None:
        is_begun = stage.cfg.run_dir.is_dir() and any(stage.cfg.run_dir.iterdir())
        return "begun" if is_begun else "to run", "", "", ""
    try:
        state = "changed" if manifest.differences(stage, done) else "done"
    except ConfigError:
        state = "done, its inputs are gone"
    made = next((made["sha256"][:12] for name, made in done.outputs.items() if name in ("model", "data")), "")
    return state, f"{done.seconds:,.1f}", short_counts(done.counts), made


def short_counts(counts: dict[str, object]) -> str:
    """The first few numbers of a stage, in a line, without how often it paused to evaluate and save, and how long."""
    numbers = {key.replace("_", " "): value for key, value in counts.items() if isinstance(value, int | float)}
    told = [key for key in numbers if not key.startswith(("evaluation", "checkpoint")) and not key.endswith("seconds")]
    return ", ".join(
        f"{key} {value:,}" if isinstance(value := numbers[key], int) else f"{key} {value:.3g}" for key in told[:6]
    )


def print_plan(states: list[tuple[PlannedStage, str]]) -> None:
    """One line a stage: kind, state, folder."""
    table = Table(box=None)
    for column in ("stage", "kind", "state", "folder"):
        table.add_column(column)
    for stage, state in states:
        table.add_row(stage.name, stage.cfg.stage, state, str(stage.cfg.run_dir))
    Console().print(table)
