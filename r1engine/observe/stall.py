"""`r1engine doctor RUN_DIR`: from outside, what each rank of a run was doing when it last moved, and who is behind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1engine.observe.heartbeat import NAME, OTHERS


@dataclass(frozen=True)
class Beat:
    """The last movement of a rank."""

    rank: int
    time: datetime
    phase: str
    step: int
    host: str
    pid: int

    @property
    def where(self) -> str:
        """Which process it is."""
        return f"rank {self.rank} on {self.host}, process {self.pid}"


def read_beats(run_dir: Path) -> list[Beat]:
    """Of every rank, those that are furthest behind first.

    Raises:
        ValueError: there is none, or a file is not a heartbeat.
    """
    files = [*run_dir.glob(NAME), *(run_dir / OTHERS).glob("*.json")]
    if not files:
        raise ValueError(f"doctor: {run_dir}: found no {NAME}, required the folder of a run that has begun")
    return sorted(map(_read, files), key=lambda beat: (beat.step, beat.time))


def _read(path: Path) -> Beat:
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank = 0 if path.name == NAME else int(path.stem)
        time = datetime.fromisoformat(row["time"])
        return Beat(rank, time, str(row["phase"]), int(row["step"]), str(row["host"]), int(row["pid"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"doctor: {path}: found no heartbeat: {error}, required one") from error


def verdict(beats: list[Beat], now: datetime | None = None) -> str:
    """Who waits for whom, in a sentence or two.

    Args:
        beats: from `read_beats`.
        now:   None: the present time.
    """
    newest = max(beat.time for beat in beats)
    still = ((now or datetime.now(UTC)) - newest).total_seconds()
    moved = f"nothing has moved for {still:,.0f} s"
    places = {(beat.step, beat.phase) for beat in beats}
    if len(places) == 1:
        ((step, phase),) = places
        who = "the only rank is" if len(beats) == 1 else f"all {len(beats)} ranks are"
        return f"{moved}; {who} in {phase} after step {step}"
    first = beats[0]
    behind = [beat for beat in beats if (beat.step, beat.phase) == (first.step, first.phase)]
    ahead = [beat for beat in beats if beat not in behind]
    return (
        f"{moved}; {_ranks(ahead)} {'wait' if len(ahead) > 1 else 'waits'} in "
        f"{' and '.join(sorted({beat.phase for beat in ahead}))} for {_ranks(behind)}, still in {first.phase} after "
        f"step {first.step}: look there first ({'; '.join(beat.where for beat in behind[:4])})"
    )


def _ranks(beats: Iterable[Beat]) -> str:
    numbers = sorted(beat.rank for beat in beats)
    return (
        f"rank {numbers[0]}"
        if len(numbers) == 1
        else f"ranks {', '.join(map(str, numbers[:8]))}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    )


def lines(run_dir: Path) -> list[str]:
    """The verdict, and a line a rank."""
    beats = read_beats(run_dir)
    return [verdict(beats)] + [
        f"{beat.time.isoformat(timespec='seconds')}  step {beat.step}  {beat.phase:10}  {beat.where}" for beat in beats
    ]
