"""The run of one stage: ranks, resume, log, evaluation, checkpoints, export, report. It knows no stage.

build the stage -> go on from the newest checkpoint -> advance, log, evaluate, save ... -> export and report
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from r1engine import checkpoint, config, ranks
from r1engine.config import ConfigError, StageConfig, to_yaml
from r1engine.ending import Ended, Ending
from r1engine.model import parallel
from r1engine.model.cpu import keep_freed_memory
from r1engine.model.layers import flash, fp8
from r1engine.observe.asked import Answers
from r1engine.observe.end import tell_end
from r1engine.observe.failure import NAME as FAILURE
from r1engine.observe.failure import Failure, RunFailed, failed
from r1engine.observe.heartbeat import Heartbeat
from r1engine.observe.live import LiveReport
from r1engine.observe.metrics import MetricsLog, Phases, device_telemetry, peak_rss_gb
from r1engine.observe.progress import Progress
from r1engine.observe.report import write_report
from r1engine.observe.starts import begun_and_ended, model_card, record_start
from r1engine.observe.trackers import open_followers
from r1engine.plan.utilization import utilization
from r1engine.ranks import World, is_first_to
from r1engine.run_lock import held
from r1engine.saving import Saving
from r1engine.stages import Advance, Stage, make_stage
from r1engine.stages.identity import check_same

SETTLE_SECONDS = 30.0  # that the ranks wait for the first one at once
COMMIT_SECONDS = 10.0  # that a failed run waits for its last checkpoint before it tells


def train(cfg: StageConfig, ending: Ending | None = None) -> None:
    """Run the stage of `cfg` to its end, from the checkpoint in its run_dir if there is one. Called on every rank.

    torch.distributed stays up at the end, so that another stage can follow; see `ranks.stop`.

    Args:
        cfg:    of the stage.
        ending: listens to the signals that end a run; None: nobody does.

    Raises:
        Ended: a signal asked for it; a checkpoint is saved and the report is written.
        RunFailed: anything went wrong after the ranks had met; the message is a summary.
        ConfigError: the parallel sizes do not fit the world, or the model, the data or the checkpoint to resume from
            is not what the config needs; see the message.
        RuntimeError: the ranks cannot meet.
    """
    started = time.monotonic()
    config.check_world(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    config.check_files(cfg)
    if cfg.model.fp8:
        fp8.check_machine()
    set_up_torch(cfg)
    with _layout(cfg) as world, held(cfg.run_dir, world):
        ended = _run_and_report(cfg, world, ending, started)
    if ended is not None:
        raise ended


def _run_and_report(cfg: StageConfig, world: World, ending: Ending | None, started: float) -> Ended | None:
    """What `train` does in the layout. The stage is let go of on return, before the layout's memory is."""
    with Progress(cfg.run_dir.name, enabled=world.is_first) as progress:
        run = Run(cfg, world, progress, ending)
        try:
            stage, ended = run.to_the_end()
        except ConfigError:
            raise
        except Exception as error:
            run.report_failure()
            raise run.failed(error) from error
    if world.is_first:
        run.report(stage, time.monotonic() - started)
    world.wait()  # a launcher ends all ranks when the first one ends
    return ended


def set_up_torch(cfg: StageConfig) -> None:
    """CPU threads, memory and determinism of this process."""
    ranks.use_threads(cfg.threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.use_deterministic_algorithms(True)
        # A debugging aid that costs a pass over memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by its class


@contextmanager
def _layout(cfg: StageConfig) -> Iterator[World]:
    """The ranks in the stage's layout; at the end its memory is free for another stage."""
    world = parallel.join(cfg.parallel)
    try:
        yield world
    finally:
        parallel.leave_layout()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Run:
    """The position of a stage in time, its logs and its checkpoints."""

    def __init__(self, cfg: StageConfig, world: World, progress: Progress, ending: Ending | None = None) -> None:
        self.cfg, self.world, self.progress, self._ending = cfg, world, progress, ending or Ending()
        self.phases = Phases(torch.cuda.synchronize if world.device.type == "cuda" else None)
        self.step = 0
        self.steps: int | None = None
        self.log: MetricsLog | None = None
        every = cfg.log.report_seconds
        self._live = LiveReport(cfg.run_dir, every_seconds=every) if world.is_first else None
        self._answers: Answers | None = None
        self._saving = Saving(cfg.checkpoint, cfg.run_dir, progress.note)  # works on the first rank
        self._saved: int | None = None  # step of the last checkpoint that is known to be good
        self._written: int | None = None  # step of the last one whose shards are written
        self._scores: dict[int, dict[str, float]] = {}  # step of the last evaluation -> its metrics
        self._stride_began = self._save_seconds = 0.0
        self._apart: dict[str, list[float]] = {"evaluation": [], "checkpoint": []}  # seconds of each, not in the rows
        self._stride_seconds: float | None = None

    def to_the_end(self) -> tuple[Stage, Ended | None]:
        """Build the stage and run it; returns it, and how a signal ended it."""
        try:
            stage, rows = self.build()
            try:
                stage.begin(rows)
                return stage, self.loop(stage)
            finally:
                stage.close()
        finally:
            self.close()

    def build(self) -> tuple[Stage, list[dict[str, Any]]]:
        """The stage, gone on from the newest checkpoint of run_dir if there is one, and the rows logged before it."""
        folder = self.world.from_first(self._saving.newest)
        self.progress.phase("load")
        if self.world.device.type == "cuda":
            self.progress.note(f"attention: {flash.choice()}")
        try:
            stage = make_stage(self.cfg, self.world, self.phases, self.progress)
            try:
                self.steps = stage.steps
                if folder is not None:
                    self._resume(stage, folder)
                rows = self.world.from_first(lambda: self._accept(folder))
                if not self.world.is_first:
                    self.progress.heartbeat = Heartbeat(self.cfg.run_dir, rank=self.world.rank)
                self._answers = Answers(self.cfg.run_dir, self.world.rank)
                return stage, rows
            except BaseException:
                stage.close()
                raise
        except ValueError as error:  # every input is checked while the stage is built
            raise ConfigError(str(error)) from error

    def loop(self, stage: Stage) -> Ended | None:
        """Advance until the stage has made its optimizer steps; then export the model as a Hugging Face folder.

        Returns:
            How a signal has ended it before; then a checkpoint is saved.
        """
        if self.step == 0:
            self._evaluate(stage)
        self.progress.start(self.step, stage.steps)
        with self._ending.at_boundaries(self._prospect):
            while self.step < stage.steps:
                self._stride(stage)
                if (number := self._asked()) is not None:
                    if self._written != self.step:
                        self._save(stage)
                    self._settle()
                    return self._ended(number)
        self.progress.phase("export")
        with stage.policy.awake():
            stage.policy.export(self.cfg.run_dir / "model", card=model_card(self.cfg, self.step))
        self._settle()
        self.world.from_first(self._saving.check_uploaded)
        return None

    def _stride(self, stage: Stage) -> None:
        self._stride_began = time.monotonic()
        done = stage.advance(self.step)
        before, self.step = self.step, self.step + done.steps
        self._log(done)
        if self._live is not None:
            self._live.tick()
        self._stride_seconds = time.monotonic() - self._stride_began
        if self._is_due(before, self.cfg.evaluation.every, stage.steps):
            self._evaluate(stage)
        if self._is_due(before, self.cfg.checkpoint.every, stage.steps):
            self._save(stage)

    def close(self) -> None:
        """Close the logs. A checkpoint that is being committed becomes whole, also when the run has failed."""
        self._saving.close()
        if self._answers is not None:
            self._answers.close()
        if self._live is not None:
            self._live.close()
        if self.log is not None:
            self.log.close()

    # ------------------------------------------------------------------ ends before the end

    def _asked(self) -> int | None:
        """The signal that any rank got, on every rank."""
        return max((n for n in self.world.everyones(self._ending.asked) if n is not None), default=None)

    def _prospect(self) -> str:
        """What to expect when a signal comes in the middle of a stride. Called from another thread."""
        text = "the run ends with a checkpoint when this stride is done"
        grace = self.cfg.checkpoint.grace_seconds
        if self._stride_seconds is None:
            return f"{text} (how long one takes is not known yet; checkpoint.grace_seconds={grace})"
        saving = self._save_seconds + self._saving.seconds
        left = max(0.0, self._stride_seconds - (time.monotonic() - self._stride_began)) + saving
        text += f", in about {left:.0f} s"
        if left > grace:
            text += f": longer than checkpoint.grace_seconds={grace}. After a kill before that, a restart goes on from "
            text += self._checkpoint_name() or "the beginning: there is no checkpoint"
        return text

    def _ended(self, number: int) -> Ended:
        return Ended(
            number,
            f"ended by {signal.Signals(number).name} at step {self.step} of {self.steps}: {self._checkpoint_name()} is "
            "saved, and the same command goes on from there",
        )

    def failed(self, error: Exception) -> RunFailed:
        """The summary of this run's end by an error; nothing on a rank that failed because another one had."""
        if not is_first_to("tell the failure"):
            return RunFailed()
        checkpoint.await_step(self.cfg.run_dir, self._written, seconds=COMMIT_SECONDS)
        return failed(
            Failure(
                run_dir=str(self.cfg.run_dir),
                rank=self.world.rank,
                ranks=self.world.size,
                phase=self.progress.current,
                step=self.step,
                steps=self.steps,
                checkpoint=self._checkpoint_name(),
                error=f"{type(error).__name__}: {error}",
            ),
            error,
        )

    def report_failure(self) -> None:
        """The report of what a failed run has logged, if anything."""
        if self.world.is_first and self.log is not None:
            with suppress(ValueError, OSError):  # what failed the run is what is told
                write_report(self.cfg.run_dir)

    def _checkpoint_name(self) -> str | None:
        written = None if self._written is None else f"step_{self._written:08d}"
        if checkpoint.latest(self.cfg.run_dir) == written:
            self._saved = self._written
        return None if self._saved is None else f"step_{self._saved:08d}"

    # ------------------------------------------------------------------ logs and evaluation

    def _is_due(self, before: int, every: int, steps: int) -> bool:
        """Whether a multiple of `every` (0: none) lies in (before, step], or this is the end."""
        return self.step == steps or (every > 0 and before // every != self.step // every)

    def _accept(self, folder: Path | None) -> list[dict[str, Any]]:
        """Nothing is written before: open the logs, cut to the present step, and record the start.

        Returns:
            The rows that the logs hold.
        """
        self.log = MetricsLog(
            self.cfg.run_dir,
            tensorboard=self.cfg.log.tensorboard,
            resume_step=None if folder is None else self.step,
        )
        for follower in open_followers(self.cfg, is_resumed=folder is not None, note=self.progress.note):
            self.log.follow(follower)
        (self.cfg.run_dir / FAILURE).unlink(missing_ok=True)
        self.progress.heartbeat = Heartbeat(self.cfg.run_dir)  # a refused start changes nothing in the folder
        changed = record_start(self.cfg, step=self.step, ranks=self.world.size)
        self.log.log_config(self.step, to_yaml(self.cfg))
        if folder is not None:
            self.progress.note(f"resumed from {folder.name}" + (f"; changed: {', '.join(changed)}" if changed else ""))
        return self._rows()

    def _rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        return [json.loads(line) for line in (self.cfg.run_dir / "metrics.jsonl").read_text().splitlines()]

    def _log(self, done: Advance) -> None:
        row = done.metrics | self.phases.take() | device_telemetry()
        row["tokens_per_second"] = done.tokens / row["seconds/total"]
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else ""
        share = utilization(done.flops, row["seconds/total"], self.world.size, device) if done.flops else None
        if share is not None:
            row["mfu"] = share
        self.progress.step(self.step, row)
        for note in done.notes:
            self.progress.note(f"step {self.step}: {note}")
        if self.log is not None:
            self.log.log(self.step, row)
            self.log.log_undecided(self.step, done.undecided)
            self.log.log_samples(self.step, done.samples)

    def _evaluate(self, stage: Stage) -> None:
        self.progress.phase("evaluate", unit="tokens")
        began = time.monotonic()
        found = stage.evaluate(self.step)
        self.phases.skip()
        if found is None:
            return
        self._apart["evaluation"].append(time.monotonic() - began)
        self._scores = {self.step: found.metrics}
        if self.cfg.checkpoint.best not in (None, *found.metrics):
            there = ", ".join(found.metrics)
            self.progress.note(
                f"checkpoint.best: found no {self.cfg.checkpoint.best} at step {self.step}, only {there}"
            )
        if self.log is not None:
            self.log.log(self.step, found.metrics)
            self.log.log_samples(self.step, found.samples)
        self.progress.note(f"step {self.step}: {found.note}")

    # ------------------------------------------------------------------ checkpoints

    def _resume(self, stage: Stage, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        check_same(state["identity"], stage.identity())
        if state["step"] > stage.steps:
            raise ConfigError(f"steps: found {stage.steps}, required at least the {state['step']} of {folder.name}")
        with stage.policy.awake():
            stage.load(folder, state)
        self.step = self._saved = self._written = state["step"]

    def _save(self, stage: Stage) -> None:
        """Until every rank has written its shards; what follows goes on beside the run."""
        began = time.monotonic()
        self.progress.phase("checkpoint")
        self._settle()
        folder = self.world.from_first(lambda: self._begin_checkpoint(stage))
        with stage.policy.awake():
            state = stage.save(folder)
        self.world.wait()
        if self.world.is_first:
            about = {"identity": stage.identity(), "step": self.step, "scores": self._scores.get(self.step, {})}
            self._saving.start(folder, about | state)
        self._written, self._save_seconds = self.step, time.monotonic() - began
        self._apart["checkpoint"].append(self._save_seconds)
        self.phases.skip()

    def _settle(self) -> None:
        """Until the checkpoint that was written last is good; what went wrong is raised on every rank."""
        while not self.world.from_first(lambda: self._saving.settle(SETTLE_SECONDS)):
            pass  # a long copy is no rank that does not answer
        self._saved = self._written

    def _begin_checkpoint(self, stage: Stage) -> Path:
        folder = checkpoint.begin(self.cfg.run_dir, self.step)
        checkpoint.free_space_check(folder, stage.policy.state_bytes() * self.world.size)
        (folder / "model").mkdir()
        return folder

    # ------------------------------------------------------------------ the end

    def report(self, stage: Stage, seconds: float) -> None:
        """Write summary.json and the report, and print what came of the run. First rank only."""
        rows = self._rows()
        summary = stage.summary(rows) | {
            "steps": self.step,
            "of_steps": stage.steps,
            **begun_and_ended(self.cfg.run_dir),
            "seconds": round(seconds, 1),
            **{f"{name}s": len(taken) for name, taken in self._apart.items()},
            **{f"{name}_seconds": round(sum(taken), 3) for name, taken in self._apart.items()},
            "peak_rss_gb": round(peak_rss_gb(), 3),
            "seed": self.cfg.seed,
        }
        tell_end(self.cfg.run_dir, rows, summary, has_model=self.step == stage.steps)
