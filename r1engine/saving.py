"""Checkpoints are hashed, committed and uploaded beside the run: the GPUs wait only until their shards are written."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path

from r1engine import checkpoint
from r1engine.config import Checkpoint, ConfigError
from r1engine.remote import Remote


class Saving:
    """What the first rank does with a checkpoint whose shards are written. A kill meanwhile leaves the one before."""

    def __init__(self, settings: Checkpoint, run_dir: Path, note: Callable[[str], None]) -> None:
        """
        Args:
            settings: section `checkpoint` of the configuration.
            run_dir:  of the run.
            note:     tells the user; called from another thread.
        """
        self._settings, self._run_dir, self._note = settings, run_dir, note
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._not_uploaded: str | None = None  # why the newest one is not there
        self.seconds = 0.0  # that the last one took
        self.remote: Remote | None = None

    def newest(self) -> Path | None:
        """The checkpoint to go on from; called before the others. Where the run folder has none, it comes from
        `checkpoint.remote`, which is tried in any case.

        Raises:
            ConfigError: `checkpoint.remote` cannot be used, or there is a checkpoint that the run must not go on from.
            RuntimeError: there are some, but none is whole.
        """
        if self._settings.remote is not None:
            self.remote = Remote(self._settings.remote)
            self.remote.check()
        folder = checkpoint.newest_complete(self._run_dir, self._note)
        if not self._settings.resume:
            self._refuse_checkpoints(folder)
        if folder is None and self.remote is not None:
            folder = self.remote.fetch(self._run_dir, self._note)
        return folder

    def _refuse_checkpoints(self, folder: Path | None) -> None:
        if folder is not None:
            raise ConfigError(
                f"run_dir: {self._run_dir} holds checkpoints up to {folder.name}, and checkpoint.resume is false; "
                "choose another run_dir, or move the folder away"
            )
        if self.remote is not None and (names := self.remote.complete()):
            raise ConfigError(
                f"checkpoint.remote: {self.remote.url} holds checkpoints up to {names[0]}, and checkpoint.resume is "
                "false; choose another place"
            )

    def start(self, partial: Path, state: dict) -> None:
        """Begin to commit; `settle` has been called since the one before.

        Args:
            partial: of `checkpoint.begin`, with the shards of all ranks.
            state:   see `checkpoint.commit`.
        """
        assert self._thread is None
        state = copy.deepcopy(state)  # the run goes on to change what it holds
        self._thread = threading.Thread(target=self._commit, args=(partial, state), name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self, seconds: float | None = None) -> bool:
        """Wait until it is committed and copied, at most so many seconds; returns whether it is.

        Raises:
            Exception: what went wrong with it.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True

    def close(self) -> None:
        """The same for a run that may have failed: what goes wrong is told."""
        try:
            self.settle()
        except Exception as error:
            self._note(f"checkpoint: {error}")

    def check_uploaded(self) -> None:
        """At the end of a run that has made all its steps.

        Raises:
            RuntimeError: the newest checkpoint is not in the remote place.
        """
        if self._not_uploaded is not None:
            raise RuntimeError(f"{self._not_uploaded}; the checkpoint is whole in {self._run_dir / 'checkpoints'}")

    def _commit(self, partial: Path, state: dict) -> None:
        began, settings = time.monotonic(), self._settings
        try:
            folder = checkpoint.commit(partial, state)
            if settings.best is not None:
                checkpoint.note_best(self._run_dir, settings.best, highest=settings.best_is == "highest")
            checkpoint.prune(self._run_dir, settings.keep, self._note)
            if self.remote is not None:
                self._upload(self.remote, folder)
        except Exception as error:
            self._error = error
        self.seconds = time.monotonic() - began

    def _upload(self, remote: Remote, folder: Path) -> None:
        """A store that is away for a while does not end the run; the next checkpoint tries again."""
        try:
            best = checkpoint.best(self._run_dir)
            remote.upload(folder, best=None if best is None else best.name)
            self._not_uploaded = None
            remote.prune(self._settings.keep)
        except RuntimeError as error:
            self._not_uploaded = str(error)
            self._note(f"{error}; the run goes on, and the next checkpoint is tried")
