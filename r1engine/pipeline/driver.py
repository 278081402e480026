"""Runs the stages of a pipeline in order: those that are missing, each in its own run folder.

A stage that is done with the same inputs and settings is not run again; one that is done with others stops the
pipeline. An unfinished stage goes on from its own checkpoint. One launch does for all stages: the ranks stay. Several
launches that join each other share the stages out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from r1engine.config import ConfigError, KindConfig
from r1engine.config.data_files import is_there
from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.observe.put import put_json
from r1engine.pipeline import kinds, manifest
from r1engine.pipeline.report import write_report
from r1engine.pipeline.status import short_counts

if TYPE_CHECKING:
    from r1engine.ending import Ending
    from r1engine.ranks import World

FAILED = "failed.json"
POLL_SECONDS = 1.0
KEPT = re.compile(r".*\.\d+")  # folders that --redo has set aside


def check(pipeline: Pipeline, world_size: int) -> list[tuple[PlannedStage, str]]:
    """Each stage with its state: "done" or "to run". Loads no torch.

    Raises:
        ConfigError: an input that no stage makes is missing, a layout does not fit the ranks, a stage is done with
            other inputs or settings, or it is done under another name.
    """
    states: list[tuple[PlannedStage, str]] = []
    for stage in pipeline.stages:
        kinds.check_layout(stage.cfg, world_size)
        missing = [line for line in kinds.input_problems(stage.cfg) if line.partition(":")[0] not in stage.needs]
        if missing:
            raise ConfigError([f"stage {stage.name}: {problem}" for problem in missing])
        waits = any(state == "to run" for needed, state in states if needed.name in stage.needs.values())
        is_finished = not waits and is_done(pipeline, stage)
        if not waits and not is_finished:
            _refuse_renamed(pipeline, stage)
        states.append((stage, "done" if is_finished else "to run"))
    return states


def is_done(pipeline: Pipeline, stage: PlannedStage) -> bool:
    """Whether a stage need not run.

    Raises:
        ConfigError: it is done with other inputs or settings.
    """
    done = manifest.read(stage.cfg.run_dir)
    if done is not None and (changed := manifest.differences(stage, done)):
        after = [later.name for later in pipeline.after(stage.name)]
        also = f", and what is made from it ({', '.join(after)})" if after else ""
        raise ConfigError(
            f"stage {stage.name} is done, but not with what is asked for: {'; '.join(changed)}; --redo {stage.name} "
            f"makes it again{also} and keeps the old folders, or choose another run_dir"
        )
    return done is not None


def _refuse_renamed(pipeline: Pipeline, stage: PlannedStage) -> None:
    """Stops where the stage was made before, under a name that the file no longer has."""
    named = {other.name for other in pipeline.stages}
    for folder in sorted(pipeline.run_dir.glob(f"*/{manifest.NAME}")):
        name = folder.parent.name
        if name in named or KEPT.fullmatch(name):
            continue
        done = manifest.read(folder.parent)
        if done is None or done.kind != stage.cfg.stage or done.settings != manifest.settings(stage.cfg):
            continue
        if not manifest.differences(stage, done):
            raise ConfigError(
                f"stage {stage.name}: {folder.parent}, which no stage has for a name, is done with the same inputs and "
                f"settings; rename it to {stage.cfg.run_dir}, or to {folder.parent}.1 to make the stage again"
            )


def dry_run(pipeline: Pipeline, world_size: int, *, is_live: bool) -> list[str]:
    """Every stage that is to run, with those of its inputs that exist; returns what the user should know.

    Args:
        pipeline:   the stages.
        world_size: processes that will run them.
        is_live:    try the sandbox of this machine and ask the servers, too.

    Raises:
        ConfigError: see `check`; or a stage could not start.
    """
    notes = []
    for stage, state in check(pipeline, world_size):
        if state == "done":
            continue
        paths = stage.cfg.inputs()
        missing = [key for key, path in paths.items() if key in stage.needs and not is_there(path)]
        try:
            found = kinds.dry_run(stage.cfg, world_size, is_whole=not missing, is_live=is_live)
        except ConfigError as error:
            raise ConfigError([f"stage {stage.name}: {problem}" for problem in error.problems]) from error
        notes += [f"stage {stage.name}: {note}" for note in found]
        notes += [f"stage {stage.name}: not checked with {key}, which is to be made" for key in missing]
    return notes


def set_aside(pipeline: Pipeline, name: str) -> list[tuple[Path, Path]]:
    """Renames the folders of a stage and of all that is made from it, the last ones first; nothing is deleted.

    Returns:
        (old, new) of each: dev1, dev1.1.

    Raises:
        ConfigError: there is no stage of this name.
    """
    after = pipeline.after(name)
    folders = [stage.cfg.run_dir for stage in reversed(after)] + [pipeline.run_dir / name]
    moved = []
    for folder in folders:
        if not folder.exists():
            continue
        number = 1
        while (new := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(new)
        moved.append((folder, new))
    return moved


def run_pipeline(
    pipeline: Pipeline, ending: Ending | None = None, *, redo: str | None = None, joins: bool = False
) -> None:
    """Run what is missing. Called on every rank.

    Args:
        pipeline: the stages.
        ending:   listens to the signals that end a run; None: nobody does.
        redo:     a stage whose folder is set aside before, with those of all that is made from it.
        joins:    others may run stages of this pipeline at the same time; each takes those that wait for nothing.

    Raises:
        Ended: a signal asked for it, and the stage has saved a checkpoint.
        ConfigError: see `check`; a stage cannot run; or another pipeline runs in this folder.
    """
    from r1engine import ranks
    from r1engine.run_lock import held

    world = ranks.start(pipeline.timeout_minutes)
    with held(pipeline.run_dir, world, is_shared=joins):
        for old, new in world.from_first(lambda: set_aside(pipeline, redo)) if redo else []:
            _tell(world, f"{old} is now {new}")
        world.from_first(lambda: check(pipeline, world.size))
        for stage in _free(pipeline, world) if joins else pipeline.stages:
            if world.from_first(partial(is_done, pipeline, stage)):
                continue
            place = f"[{pipeline.place(stage.name) + 1}/{len(pipeline.stages)}] {stage.name}"
            _tell(world, f"{place} ({stage.cfg.stage})")
            started = time.monotonic()
            counts = _run_stage(stage, world, ending, started)
            _tell(world, f"{place} is done in {_clock(time.monotonic() - started)}  {short_counts(counts)}")
            world.from_first(partial(write_report, pipeline))
        if joins:  # the launch that ends first ends those that it has started, before they have written it
            world.from_first(partial(write_report, pipeline))


def _free(pipeline: Pipeline, world: World) -> Iterator[PlannedStage]:
    """The stages that this run gets, each when it waits for nothing, until all are done by whomever."""
    from r1engine.pipeline.claims import Claims

    claims, told = Claims(pipeline, partial(is_done, pipeline)), ""
    while not world.from_first(claims.are_done):
        if (name := world.from_first(claims.take)) is not None:
            try:
                yield pipeline.stages[pipeline.place(name)]
            finally:
                claims.give_back()  # on the first rank it has a lock; not collective: one rank alone may have failed
            continue
        if told != (told := world.from_first(claims.waits_for)):
            _tell(world, f"waits for {told}")
        time.sleep(POLL_SECONDS)


def run_alone(cfg: KindConfig, ending: Ending | None) -> None:
    """One stage that stands in no pipeline, which writes no manifest. Called on every rank.

    Raises:
        ConfigError: the stage cannot run, or another one runs in its folder.
    """
    from r1engine import ranks
    from r1engine.run_lock import held

    world = ranks.start()
    problems = world.from_first(partial(kinds.input_problems, cfg)) or cfg.source_problems()
    if problems:
        raise ConfigError(problems)
    with held(cfg.run_dir, world):
        try:
            counts = kinds.run_kind(cfg, world, ending)
        except (ValueError, OSError) as error:
            raise ConfigError.of(error) from error
        _tell(world, f"{cfg.run_dir}: {short_counts(counts)}")


def _run_stage(stage: PlannedStage, world: World, ending: Ending | None, started: float) -> dict[str, Any]:
    """One stage to its end, marked as done; what it tells."""
    made_from = world.from_first(partial(manifest.inputs, stage))

    def finish(counts: dict[str, Any]) -> None:
        manifest.write(stage, made_from, counts, time.monotonic() - started)

    try:
        if stage.cfg.ALONE and world.size > 1:
            return _alone(stage, world, finish)
        counts = kinds.run_kind(stage.cfg, world, ending)
    except (ValueError, OSError) as error:
        raise ConfigError([f"stage {stage.name}: {problem}" for problem in ConfigError.of(error).problems]) from error
    world.from_first(lambda: finish(counts))
    return counts


def _alone(stage: PlannedStage, world: World, finish: Any) -> dict[str, Any]:
    """The first rank does it; the others look for its end in the folder. A collective would time out."""
    from r1engine.observe.failure import RunFailed

    folder = stage.cfg.run_dir

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)

    world.from_first(begin)
    if not world.is_first:
        while not (folder / manifest.NAME).is_file():
            if (folder / FAILED).is_file():
                raise RunFailed()
            time.sleep(POLL_SECONDS)
        return {}
    try:
        counts = kinds.run_kind(stage.cfg, world, None)
        finish(counts)
    except BaseException as error:
        put_json(folder / FAILED, {"error": f"{type(error).__name__}: {error}"})
        raise
    return counts


def _tell(world: World, line: str) -> None:
    if world.is_first:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
