"""A pipeline that several launches run together: a lock a stage. Loads no torch.

A launch takes the first stage that waits for no other and that no other launch has. A lock ends with the process that
has it, so that a stage whose launch was killed is free, and goes on from its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from r1engine.config.pipeline import Pipeline, PlannedStage
from r1engine.run_lock import locked

LOCKS = ".stages"  # in the folder of the pipeline, a file a stage


class Claims:
    """What one launch has of a pipeline. Used on the first rank alone."""

    def __init__(self, pipeline: Pipeline, is_done: Callable[[PlannedStage], bool]) -> None:
        """
        Args:
            pipeline: the stages.
            is_done:  whether one need not run; asked of a stage when all that it is made from is done.
        """
        self._pipeline, self._is_done = pipeline, is_done
        self._done: set[str] = set()
        self._lock: BinaryIO | None = None
        self._others: dict[str, str] = {}  # stage -> who has it

    def are_done(self) -> bool:
        """Whether every stage is.

        Raises:
            ConfigError: see `driver.is_done`.
        """
        for stage in self._pipeline.stages:
            if stage.name not in self._done and self._is_ready(stage) and self._is_done(stage):
                self._done.add(stage.name)
        return len(self._done) == len(self._pipeline.stages)

    def take(self) -> str | None:
        """The name of a stage that this launch has from here on; None: there is none to have.

        Raises:
            ConfigError: see `driver.is_done`.
        """
        folder = self._pipeline.run_dir / LOCKS
        folder.mkdir(exist_ok=True)
        self.are_done()
        self._others = {}
        for stage in self._pipeline.stages:
            if stage.name in self._done or not self._is_ready(stage):
                continue
            try:
                self._lock = locked(folder / stage.name)
            except BlockingIOError as owner:
                self._others[stage.name] = str(owner)
                continue
            _see_anew(stage.cfg.run_dir)
            if not self._is_done(stage):  # its last owner has ended meanwhile
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

    def _is_ready(self, stage: PlannedStage) -> bool:
        return self._done.issuperset(stage.needs.values())


def _see_anew(folder: Path) -> None:
    """An NFS client may hold for half a minute that a file is not there, whatever is locked; to open a folder makes it
    ask the server (close-to-open consistency)."""
    for one in (folder.parent, folder):
        if one.is_dir():
            os.scandir(one).close()
