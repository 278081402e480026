"""A pipeline that several launches run together: a lock a stage. Loads no torch.

A launch takes the first stage that waits for no other and that no other launch has. A lock ends with the process that
has it, so that a stage whose launch was killed is free, and goes on from its checkpoint.
"""

from __future__ import annotations

from typing import BinaryIO

from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.pipeline import manifest
from r1engine.run_lock import locked

LOCKS = ".stages"  # in the folder of the pipeline, a file a stage


class Claims:
    """What one launch has of a pipeline. Used on the first rank alone."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Nothing yet."""
        self._pipeline = pipeline
        self._lock: BinaryIO | None = None
        self._others: dict[str, str] = {}  # stage -> who has it

    def is_done(self) -> bool:
        """Whether every stage is."""
        return all(map(_is_done, self._pipeline.stages))

    def take(self) -> str | None:
        """The name of a stage that this launch has from now on; None: there is none to have."""
        folder = self._pipeline.run_dir / LOCKS
        folder.mkdir(exist_ok=True)
        done = {stage.name for stage in self._pipeline.stages if _is_done(stage)}
        self._others = {}
        for stage in self._pipeline.stages:
            if stage.name in done or not done.issuperset(stage.needs.values()):
                continue
            try:
                self._lock = locked(folder / stage.name)
            except BlockingIOError as owner:
                self._others[stage.name] = str(owner)
                continue
            if not _is_done(stage):  # its last owner has ended meanwhile
                return stage.name
            self.give_back()
        return None

    def give_back(self) -> None:
        """Lets others have the stage, if it is not done."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def waits_for(self) -> str:
        """Which stages others have, as `take` found them."""
        return ", ".join(f"{stage} ({owner})" for stage, owner in self._others.items())


def _is_done(stage: PlannedStage) -> bool:
    return manifest.read(stage.cfg.run_dir) is not None
