"""Runs the stages of a pipeline in order: those that are missing, each in its own run folder.

A stage that is done with the same inputs and settings is not run again; one that is done with others stops the
pipeline. An unfinished stage goes on from its own checkpoint. One launch does for all stages: the ranks stay.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from r1engine.config import ConfigError, StageConfig, TinyConfig, check_files, check_world
from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.pipeline import manifest

if TYPE_CHECKING:
    from r1engine.ending import Ending
    from r1engine.ranks import World


def check(pipeline: Pipeline, world_size: int) -> list[tuple[PlannedStage, str]]:
    """Each stage with its state: "done" or "to run". Loads no torch.

    Raises:
        ConfigError: an input that no stage makes is missing, a layout does not fit the ranks, or a stage is done with
            other inputs or settings.
    """
    states: list[tuple[PlannedStage, str]] = []
    for stage in pipeline.stages:
        if isinstance(stage.cfg, StageConfig):
            check_world(stage.cfg, world_size)
            _check_inputs(stage, stage.cfg)
        waits = any(state == "to run" for needed, state in states if needed.name in stage.needs.values())
        states.append((stage, "done" if not waits and is_done(stage) else "to run"))
    return states


def _check_inputs(stage: PlannedStage, cfg: StageConfig) -> None:
    """Those that no stage makes."""
    try:
        check_files(cfg)
    except ConfigError as error:
        missing = [problem for problem in error.problems if problem.partition(":")[0] not in stage.needs]
        if missing:
            raise ConfigError([f"stage {stage.name}: {problem}" for problem in missing]) from None


def dry_run(pipeline: Pipeline, world_size: int, *, is_live: bool) -> list[str]:
    """Every stage that is to run, with those of its inputs that exist; returns what the user should know.

    Args:
        pipeline:   the stages.
        world_size: processes that will run them.
        is_live:    try the sandbox of this machine and ask the servers, too.

    Raises:
        ConfigError: see `check`; or a stage could not start.
    """
    from r1engine.stages.check import check_rows
    from r1engine.stages.check import dry_run as check_stage

    notes = []
    for stage, state in check(pipeline, world_size):
        if state == "done" or isinstance(stage.cfg, TinyConfig):
            continue
        try:
            found = check_rows(stage.cfg) if missing(stage) else check_stage(stage.cfg, world_size, is_live=is_live)
        except ConfigError as error:
            raise ConfigError([f"stage {stage.name}: {problem}" for problem in error.problems]) from error
        notes += [f"stage {stage.name}: {note}" for note in found]
        notes += [f"stage {stage.name}: not checked with {key}, which is to be made" for key in missing(stage)]
    return notes


def missing(stage: PlannedStage) -> list[str]:
    """Keys of the inputs that an earlier stage is still to make."""
    assert isinstance(stage.cfg, StageConfig)
    files = stage.cfg.input_files() | {"model.path": stage.cfg.model.path}
    return [key for key, path in files.items() if key in stage.needs and path is not None and not path.exists()]


def is_done(stage: PlannedStage) -> bool:
    """Whether a stage need not run.

    Raises:
        ConfigError: it is done with other inputs or settings.
    """
    changed = manifest.differences(stage)
    if changed:
        raise ConfigError(
            f"stage {stage.name} is done, but not with what is asked for: {'; '.join(changed)}; rename or delete "
            f"{stage.cfg.run_dir} to run it again, or choose another run_dir"
        )
    return changed is not None


def print_plan(pipeline: Pipeline, world_size: int) -> None:
    """One line a stage: kind, state, folder."""
    table = Table(box=None)
    for column in ("stage", "kind", "state", "folder"):
        table.add_column(column)
    for stage, state in check(pipeline, world_size):
        table.add_row(stage.name, stage.cfg.stage, state, str(stage.cfg.run_dir))
    Console().print(table)


def run_pipeline(pipeline: Pipeline, ending: Ending | None = None) -> None:
    """Run what is missing. Called on every rank.

    Args:
        pipeline: the stages.
        ending:   listens to the signals that end a run; None: nobody does.

    Raises:
        Ended: a signal asked for it, and the stage has saved a checkpoint.
        ConfigError: see `check`; or a stage cannot run.
    """
    from r1engine import ranks

    world = ranks.start(pipeline.timeout_minutes)
    world.from_first(lambda: check(pipeline, world.size))
    for number, stage in enumerate(pipeline.stages, start=1):
        if world.from_first(partial(is_done, stage)):
            continue
        if world.is_first:
            line = f"[{number}/{len(pipeline.stages)}] {stage.name} ({stage.cfg.stage})"
            Console().print(line, markup=False, highlight=False)
        _run_stage(stage, world, ending)


def _run_stage(stage: PlannedStage, world: World, ending: Ending | None) -> None:
    """One stage to its end, marked as done."""
    started = time.monotonic()
    made_from = world.from_first(partial(manifest.inputs, stage.cfg))
    if isinstance(stage.cfg, TinyConfig):
        from r1engine.demo.tiny import write_world

        world.from_first(partial(write_world, stage.cfg))
    else:
        from r1engine.run import train
        from r1engine.stages.check import check_start

        world.once_a_node(partial(check_start, stage.cfg, world.size))
        train(stage.cfg, ending)
    world.from_first(lambda: manifest.write(stage, made_from, seconds=time.monotonic() - started))
