"""The run of one stage: ranks, resume, log, evaluation, checkpoints, export, report. It knows no stage.

build the stage -> go on from the newest checkpoint -> advance, log, evaluate, save ... -> export and report
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from r1engine import checkpoint, config
from r1engine.config import ConfigError, StageConfig
from r1engine.model import parallel
from r1engine.model.cpu import keep_freed_memory
from r1engine.model.layers import fp8
from r1engine.observe.metrics import MetricsLog, Phases, device_telemetry, peak_rss_gb
from r1engine.observe.progress import Progress
from r1engine.observe.report import write_report
from r1engine.observe.summary import print_summary
from r1engine.ranks import World
from r1engine.stages import Advance, Stage, make_stage


def train(cfg: StageConfig) -> None:
    """Run the stage of `cfg` to its end, from the checkpoint in its run_dir if there is one. Called on every rank.

    torch.distributed stays up at the end, so that another stage can follow; see `ranks.stop`.

    Raises:
        ConfigError: the parallel sizes do not fit the world, or the model, the data or the checkpoint to resume from
            is not what the config needs; see the message.
        RuntimeError: no disk space, no whole checkpoint, or the ranks cannot meet.
    """
    started = time.monotonic()
    config.check_world(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    config.check_files(cfg)
    if cfg.model.fp8:
        fp8.check_machine()
    set_up_torch(cfg)
    with _layout(cfg) as world, Progress(cfg.run_dir.name, enabled=world.is_first) as progress:
        run = Run(cfg, world, progress)
        try:
            stage, rows = run.build()
            try:
                stage.begin(rows)
                run.loop(stage)
            finally:
                stage.close()
        finally:
            run.close()
    if world.is_first:
        run.report(stage, time.monotonic() - started)


def set_up_torch(cfg: StageConfig) -> None:
    """CPU threads, memory and determinism of this process."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cfg.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
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

    def __init__(self, cfg: StageConfig, world: World, progress: Progress) -> None:
        self.cfg, self.world, self.progress = cfg, world, progress
        self.phases = Phases(torch.cuda.synchronize if world.device.type == "cuda" else None)
        self.step = 0
        self.log: MetricsLog | None = None

    def build(self) -> tuple[Stage, list[dict[str, Any]]]:
        """The stage, gone on from the newest checkpoint of run_dir if there is one, and the rows logged before it."""
        folder = self.world.from_first(self._newest_checkpoint)
        if self.world.is_first:
            self.cfg.run_dir.mkdir(parents=True, exist_ok=True)
            config.dump(self.cfg, self.cfg.run_dir / "config.yaml")
        self.progress.phase("load")
        try:
            stage = make_stage(self.cfg, self.world, self.phases, self.progress)
            try:
                if folder is not None:
                    self._resume(stage, folder)
                return stage, self.world.from_first(lambda: self._open_log(is_fresh=folder is None))
            except BaseException:
                stage.close()
                raise
        except ValueError as error:  # every input is checked while the stage is built
            raise ConfigError(str(error)) from error

    def loop(self, stage: Stage) -> None:
        """Advance until the stage has made its optimizer steps; then export the model as a Hugging Face folder."""
        if self.step == 0:
            self._evaluate(stage)
        self.progress.start(self.step, stage.steps)
        while self.step < stage.steps:
            done = stage.advance(self.step)
            before, self.step = self.step, self.step + done.steps
            self._log(done)
            if self._is_due(before, self.cfg.evaluation.every, stage.steps):
                self._evaluate(stage)
            if self._is_due(before, self.cfg.checkpoint.every, stage.steps):
                self._save(stage)
        with stage.policy.awake():
            stage.policy.export(self.cfg.run_dir / "model")

    def close(self) -> None:
        """Close the logs."""
        if self.log is not None:
            self.log.close()

    # ------------------------------------------------------------------ logs and evaluation

    def _is_due(self, before: int, every: int, steps: int) -> bool:
        """Whether a multiple of `every` (0: none) lies in (before, step], or this is the end."""
        return self.step == steps or (every > 0 and before // every != self.step // every)

    def _open_log(self, *, is_fresh: bool) -> list[dict[str, Any]]:
        """Open the logs, cut to the present step; returns the rows that they hold."""
        self.log = MetricsLog(
            self.cfg.run_dir,
            tensorboard=self.cfg.log.tensorboard,
            wandb_project=self.cfg.log.wandb_project,
            config=self.cfg.model_dump(mode="json"),
            resume_step=None if is_fresh else self.step,
        )
        return self._rows()

    def _rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        return [json.loads(line) for line in (self.cfg.run_dir / "metrics.jsonl").read_text().splitlines()]

    def _log(self, done: Advance) -> None:
        row = done.metrics | self.phases.take() | device_telemetry()
        row["tokens_per_second"] = done.tokens / row["seconds/total"]
        self.progress.step(self.step, row)
        for note in done.notes:
            self.progress.note(f"step {self.step}: {note}")
        if self.log is not None:
            self.log.log(self.step, row)
            self.log.log_undecided(self.step, done.undecided)
            self.log.log_samples(self.step, done.samples)

    def _evaluate(self, stage: Stage) -> None:
        self.progress.phase("evaluate")
        found = stage.evaluate(self.step)
        self.phases.skip()
        if found is None:
            return
        if self.log is not None:
            self.log.log(self.step, found.metrics)
            self.log.log_samples(self.step, found.samples)
        self.progress.note(f"step {self.step}: {found.note}")

    # ------------------------------------------------------------------ checkpoints

    def _newest_checkpoint(self) -> Path | None:
        folder = checkpoint.newest_complete(self.cfg.run_dir, self.progress.note)
        if folder is not None and not self.cfg.checkpoint.resume:
            raise ConfigError(
                f"run_dir: {self.cfg.run_dir} holds checkpoints up to {folder.name}, and checkpoint.resume is false; "
                "choose another run_dir or delete the folder"
            )
        return folder

    def _resume(self, stage: Stage, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        checkpoint.check_same(state, stage.identity())
        with stage.policy.awake():
            stage.load(folder, state)
        self.step = state["step"]
        self.progress.note(f"resumed from {folder.name}")

    def _save(self, stage: Stage) -> None:
        self.progress.phase("checkpoint")
        folder = self.world.from_first(lambda: self._begin_checkpoint(stage))
        with stage.policy.awake():
            state = stage.save(folder)
        self.world.wait()
        if self.world.is_first:
            checkpoint.commit(folder, stage.identity() | {"step": self.step} | state)
            checkpoint.prune(self.cfg.run_dir, self.cfg.checkpoint.keep)
        self.world.wait()
        self.phases.skip()

    def _begin_checkpoint(self, stage: Stage) -> Path:
        folder = checkpoint.begin(self.cfg.run_dir, self.step)
        checkpoint.free_space_check(folder, stage.policy.state_bytes() * self.world.size)
        (folder / "model").mkdir()
        return folder

    # ------------------------------------------------------------------ the end

    def report(self, stage: Stage, seconds: float) -> None:
        """Write summary.json and the report, and print what came of the run. First rank only."""
        run_dir, rows = self.cfg.run_dir, self._rows()
        summary = stage.summary(rows) | {
            "seconds": round(seconds, 1),
            "peak_rss_gb": round(peak_rss_gb(), 3),
            "seed": self.cfg.seed,
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        png, html = write_report(run_dir)
        console = Console()
        evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
        samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
        if evaluations:
            heldout = [sample for sample in samples if sample.get("heldout")][-2:]
            print_summary(evaluations[0], evaluations[-1], heldout, console=console)
        files = {"curves": png, "report": html, "summary": run_dir / "summary.json", "model": run_dir / "model"}
        console.print("\n".join(f"{name}: {path}" for name, path in files.items()), highlight=False)
