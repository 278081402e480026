"""Other places that a run is logged to: W&B, MLflow, Trackio, SwanLab. Each is opened by one function of a few lines.

A tracker that fails while the run goes on is let go of, and that is said once: no run ends because of its display. One
that cannot be opened at the start is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1engine.config import StageConfig
from r1engine.config.read import flat
from r1engine.observe.exporter import Exporter
from r1engine.observe.metrics import Follower

Sample = dict[str, Any]


def open_followers(cfg: StageConfig, *, is_resumed: bool, note: Callable[[str], None]) -> Iterator[Follower]:
    """What `log` asks for beside the run's own files.

    Raises:
        RuntimeError: a tracker or the port of Prometheus cannot be opened.
    """
    log = cfg.log
    if log.prometheus_port is not None:
        exporter = Exporter(log.prometheus_host, log.prometheus_port, cfg.run_dir.name)
        note(f"metrics for Prometheus: http://{log.prometheus_host}:{exporter.port}/metrics")
        yield exporter
    if log.trackers:
        config = cfg.model_dump(mode="json")
        yield Trackers(log.trackers, log.project, cfg.run_dir, config, is_resumed=is_resumed, note=note)


class Tracker(NamedTuple):
    """What every tracker can do."""

    log: Callable[[dict[str, float], int], object]  # (row, step)
    samples: Callable[[list[Sample], int], object]  # (rows, step)
    close: Callable[[], object]
    run_id: str


class TrackedRun(NamedTuple):
    """What a tracker shows of a run. `run_id` is what the tracker called it before a resume."""

    project: str
    run_dir: Path
    config: dict[str, Any]  # JSON values
    run_id: str | None


class Trackers:
    """The trackers of a run, by name."""

    def __init__(
        self,
        names: Sequence[str],
        project: str,
        run_dir: Path,
        config: dict[str, Any],
        *,
        is_resumed: bool,
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            names:      keys of OPENERS.
            project:    under which name the trackers file the run.
            run_dir:    its last part names the run; run_dir/trackers/NAME.id holds the tracker's own name for it.
            config:     the resolved configuration, JSON values only.
            is_resumed: go on with the tracker's run that this run had before.
            note:       tells the user something.

        Raises:
            RuntimeError: a tracker cannot be opened.
        """
        self._note = note
        self._open: dict[str, Tracker] = {}
        for name in names:
            id_file = run_dir / "trackers" / f"{name}.id"
            had = id_file.read_text().strip() if is_resumed and id_file.exists() else None
            try:
                tracker = OPENERS[name](TrackedRun(project, run_dir, config, had))
            except Exception as error:  # whatever the package raises
                self.close()
                raise RuntimeError(f"log.trackers: {name} cannot be opened: {type(error).__name__}: {error}") from error
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(tracker.run_id + "\n")
            self._open[name] = tracker

    def log(self, step: int, row: dict[str, float]) -> None:
        """A row of metrics."""
        self._each(lambda tracker: tracker.log(row, step))

    def samples(self, step: int, rows: list[Sample]) -> None:
        """Completions of a step."""
        if rows:
            self._each(lambda tracker: tracker.samples(rows, step))

    def close(self) -> None:
        """Ends every tracker's run; further calls do nothing."""
        self._each(lambda tracker: tracker.close())
        self._open = {}

    def _each(self, do: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever the package raises: the run is worth more than its display
                del self._open[name]
                self._note(f"log.trackers: {name} failed ({type(error).__name__}: {error}); the run goes on without it")


def _open_wandb(run: TrackedRun) -> Tracker:
    import wandb

    made = wandb.init(
        project=run.project,
        name=run.run_dir.name,
        dir=str(run.run_dir),
        config=run.config,
        id=run.run_id,
        resume="allow",
    )

    def samples(rows: list[Sample], step: int) -> None:
        # W&B ignores rows up to the last step it has, so the steps redone by a resumed run appear once.
        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])
        made.log({"samples": table}, step=step)

    return Tracker(lambda row, step: made.log(row, step=step), samples, made.finish, made.id)


def _open_mlflow(run: TrackedRun) -> Tracker:
    import mlflow

    mlflow.set_experiment(run.project)
    made = mlflow.start_run(run_id=run.run_id, run_name=run.run_dir.name)
    if run.run_id is None:
        mlflow.log_params(flat(run.config))
    return Tracker(
        lambda row, step: mlflow.log_metrics(row, step=step),
        lambda rows, step: mlflow.log_dict({"samples": rows}, f"samples/{step:08d}.json"),
        mlflow.end_run,
        made.info.run_id,
    )


def _open_trackio(run: TrackedRun) -> Tracker:
    import trackio

    made = trackio.init(
        project=run.project,
        name=run.run_id or run.run_dir.name,
        config=flat(run.config),
        resume="never" if run.run_id is None else "allow",  # not another run in a folder of this name
    )

    def samples(rows: list[Sample], step: int) -> None:
        columns = list(rows[0])
        cells = [[_cell(row.get(column)) for column in columns] for row in rows]
        trackio.log({"samples": trackio.Table(columns=columns, data=cells)}, step=step)

    return Tracker(lambda row, step: trackio.log(row, step=step), samples, trackio.finish, made.name)


def _cell(value: Any) -> str | int | float | bool | None:
    """Of a table that holds numbers and texts alone."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _open_swanlab(run: TrackedRun) -> Tracker:
    import swanlab

    made = swanlab.init(
        project=run.project,
        name=run.run_dir.name,
        log_dir=str(run.run_dir / "swanlab"),
        config=run.config,
        id=run.run_id,
        resume="allow",
    )

    def samples(rows: list[Sample], step: int) -> None:
        swanlab.log({"samples": [swanlab.Text(str(row.get("completion", row))) for row in rows]}, step=step)

    return Tracker(lambda row, step: swanlab.log(row, step=step), samples, swanlab.finish, made.id)


OPENERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
    "swanlab": _open_swanlab,
}
