"""What a run writes down while it goes: metrics.jsonl, samples.jsonl, TensorBoard, and phase times."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TextIO


class Follower(Protocol):
    """Gets what is logged, too."""

    def log(self, step: int, row: dict[str, float]) -> None:
        """A row of metrics."""

    def samples(self, step: int, rows: list[dict]) -> None:
        """Completions."""

    def close(self) -> None:
        """The run has ended; may be called again."""


class MetricsLog:
    """The logs of one run; only rank 0 makes one.

    Rows are numbered by optimizer steps done, as checkpoints are: resuming from step 100 keeps the rows up to
    and including step 100 and cuts the later ones away, so that a killed run leaves no step twice.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int | None) -> None:
        """Opens the logs for appending.

        Args:
            run_dir:     folder of the run; made if missing.
            tensorboard: also write run_dir/tb.
            resume_step: step of the checkpoint the run goes on from; None: a fresh run. Logs that an earlier
                run left in run_dir are then kept beside the fresh ones as metrics.1.jsonl, metrics.2.jsonl, ...

        Raises:
            RuntimeError: tensorboard is asked for, but is not installed.
            ValueError: a log to resume holds a broken line that is not the last one.
        """
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise RuntimeError(
                "metrics: tensorboard is asked for but not installed; `pip install tensorboard` or set "
                "log.tensorboard=false"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", "undecided.jsonl"):
            if resume_step is None:
                _set_aside(run_dir / name)
            else:
                _cut_after(run_dir / name, resume_step)
        self._metrics = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._samples = open(run_dir / "samples.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._undecided = open(run_dir / "undecided.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = _open_tensorboard(run_dir, resume_step) if tensorboard else None
        self._followers: list[Follower] = []

    def follow(self, follower: Follower) -> None:
        """From now on `follower` gets every row and sample; `close` closes it."""
        self._followers.append(follower)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Appends one row. NaN and infinity become null, and their keys are listed under "nonfinite".

        Args:
            step: optimizer steps done.
            row:  flat "group/name" -> number; see docs/metrics.md for the keys.
        """
        row = {key: value if isinstance(value, int) else float(value) for key, value in row.items()}
        self._metrics.write(_line({"step": step, **row}))
        self._metrics.flush()
        if self._tensorboard is not None:
            for key, value in row.items():  # a tag without a section would be a section of its own
                self._tensorboard.add_scalar(key if "/" in key else f"train/{key}", value, step)
            self._tensorboard.flush()
        for follower in self._followers:
            follower.log(step, row)

    def log_samples(self, step: int, rows: list[dict]) -> None:
        """Appends sampled completions to samples.jsonl.

        Args:
            step: optimizer steps done.
            rows: prompt, question, answer, completion, "reward/<component>", advantage, length (tokens), truncated.
        """
        _append(self._samples, step, rows)
        if self._tensorboard is not None and rows:
            name = "heldout" if rows[0].get("heldout") else "training"
            self._tensorboard.add_text(f"samples/{name}", _as_text(rows[0]), step)
        for follower in self._followers:
            follower.samples(step, rows)

    def log_config(self, step: int, text: str) -> None:
        """Shows the configuration of a start in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_text("config", _indented(text), step)

    def log_undecided(self, step: int, rows: list[dict]) -> None:
        """Appends to undecided.jsonl the completions that no rule could decide, whole.

        Args:
            step: optimizer steps done.
            rows: a record as `r1engine reward` takes it, and why it is undecided.
        """
        _append(self._undecided, step, rows)

    def close(self) -> None:
        """Closes every log; further calls of `close` do nothing."""
        self._metrics.close()
        self._samples.close()
        self._undecided.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for follower in self._followers:
            follower.close()
        self._followers = []


class Phases:
    """Seconds spent in each named phase of an iteration."""

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        """
        Args:
            synchronize: waits for queued device work at both ends of a phase (torch.cuda.synchronize), so that
                a kernel is counted in the phase that launched it; None on CPU.
        """
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to phase `name`."""
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
            self._synchronize()  # not after an exception: it could hang or hide the cause
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def skip(self) -> None:
        """Throws the seconds since the last `take` away: they belong to no iteration."""
        self.take()

    def take(self) -> dict[str, float]:
        """Returns {"seconds/<phase>": s, ..., "seconds/total": wall seconds since the last take}, and resets."""
        clock = time.perf_counter()
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        taken["seconds/total"] = clock - self._since
        self._seconds, self._since = {}, clock
        return taken


def peak_rss_gb() -> float:
    """Largest resident memory (GB) that this process, or any one child that has ended, has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * unit / 1e9


def device_telemetry() -> dict[str, float]:
    """Reads the GPU this process uses, through NVML.

    Returns:
        "gpu/memory_used_gb", "gpu/utilization" (percent), "gpu/temperature" (C), "gpu/power" (W) and
        "gpu/sm_clock" (MHz); what the device does not report (a MIG slice has no utilization) is left out.
        Empty where there is no NVIDIA driver or nvidia-ml-py is not installed.
    """
    handle = nvml_device()
    if handle is None:
        return {}
    import pynvml

    readings: dict[str, Callable[[], float]] = {
        "gpu/memory_used_gb": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
        "gpu/utilization": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "gpu/temperature": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "gpu/power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "gpu/sm_clock": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
    }
    found: dict[str, float] = {}
    for key, read in readings.items():
        with suppress(pynvml.NVMLError_NotSupported):
            found[key] = float(read())
    return found


@cache
def nvml_device() -> Any | None:
    """NVML handle of the GPU that torch uses in this process; None without driver or nvidia-ml-py."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded, pynvml.NVMLError_NoPermission):
        return None
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return pynvml.nvmlDeviceGetHandleByIndex(0) if pynvml.nvmlDeviceGetCount() else None
    # By UUID: NVML counts all GPUs of the machine, torch those of CUDA_VISIBLE_DEVICES, in another order.
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return None  # a MIG slice has a UUID of another form


def _line(row: dict[str, Any]) -> str:
    """One JSON line; NaN and infinity, which JSON does not have, as null."""
    nonfinite = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if nonfinite:
        row = {**row, **dict.fromkeys(nonfinite), "nonfinite": nonfinite}
    return json.dumps(row, allow_nan=False) + "\n"


def _as_text(sample: dict[str, Any]) -> str:
    """A completion for TensorBoard, which reads Markdown: all of it as code."""
    facts = {name: sample.get(name) for name in ("answer", "verdict", "reason", "advantage", "length")}
    told = "\n".join(f"{name}: {value}" for name, value in facts.items())
    return _indented(f"{sample.get('prompt', '')}\n{sample.get('completion', '')}\n\n{told}")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _append(file: TextIO, step: int, rows: list[dict]) -> None:
    for row in rows:
        file.write(_line({"step": step, **row}))
    file.flush()


def _cut_after(path: Path, step: int) -> None:
    """Drops the rows of later steps, and a last line that a kill cut short; atomically."""
    if not path.exists():
        return
    temporary = path.with_name(f".{path.name}.partial")
    with open(path, encoding="utf-8", errors="replace") as old, open(temporary, "w", encoding="utf-8") as kept:
        for number, line in enumerate(old, 1):
            if not line.endswith("\n"):
                break
            try:
                row_step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"metrics: line {number} of {path} is not a row with a step: {error}") from error
            if row_step <= step:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(temporary, path)


def _set_aside(path: Path) -> None:
    """Renames the log of an earlier run: metrics.jsonl -> metrics.1.jsonl."""
    if not path.exists() or not path.stat().st_size:
        return
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}.jsonl")).exists():
        number += 1
    path.rename(target)


def _open_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step: TensorBoard hides what a killed run wrote after the checkpoint.
    return SummaryWriter(str(run_dir / "tb"), purge_step=None if resume_step is None else resume_step + 1)
