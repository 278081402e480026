"""`r1engine doctor RUN_DIR`: from outside, what each rank of a run was doing when it last moved, who is behind, and who
waits for which collective."""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1engine.observe.asked import FOLDER, LOOK_SECONDS, QUESTION
from r1engine.observe.collectives import DUMP, Recorded, ranks_named, read_dump, waits
from r1engine.observe.heartbeat import NAME, OTHERS
from r1engine.observe.put import put_text

ANSWER_SECONDS = 5 * LOOK_SECONDS


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
    late = ranks_named([beat.rank for beat in behind])
    return (
        f"{moved}; {ranks_named([beat.rank for beat in ahead])} {'wait' if len(ahead) > 1 else 'waits'} in "
        f"{' and '.join(sorted({beat.phase for beat in ahead}))} for {late}, still in {first.phase} after "
        f"step {first.step}: look there first ({'; '.join(beat.where for beat in behind[:4])})"
    )


def lines(run_dir: Path, seconds: float = ANSWER_SECONDS) -> list[str]:
    """The verdict, a line a rank, and what the ranks and PyTorch's dumps in the folder say of collectives.

    Args:
        run_dir: of the run, or a folder that holds dumps of flight recorders.
        seconds: until a rank that does not answer counts as one that cannot.

    Raises:
        ValueError: nothing of this is there, or it is broken.
    """
    dumps = [read_dump(path) for path in sorted(run_dir.iterdir()) if DUMP.fullmatch(path.name) and path.is_file()]
    if dumps and not (run_dir / NAME).is_file():
        return _told(dumps)
    beats = read_beats(run_dir)
    found = [verdict(beats)] + [
        f"{beat.time.isoformat(timespec='seconds')}  step {beat.step}  {beat.phase:10}  {beat.where}" for beat in beats
    ]
    answers = _asked(run_dir, [beat.rank for beat in beats], seconds)
    silent = [beat for beat in beats if beat.rank not in {answer.rank for answer in answers}]
    if not answers:
        found.append(f"no rank answers within {seconds:.0f} s: the run has ended, or all its processes are stopped")
    for beat in silent[:8] if answers else []:
        found.append(f"{beat.where} does not answer within {seconds:.0f} s: it has ended or is stopped, or its node is")
    return found + (_told(answers) if answers else []) + (_told(dumps) if dumps else [])


def _told(recorded: list[Recorded]) -> list[str]:
    """Who waits for which collective, and where ranks stand that are in none, those at one place once."""
    found = waits(recorded) or ["no rank waits in a collective that another has not come to"]
    if not any(one.entries for one in recorded):
        found = ["nothing is recorded of collectives: there is one rank, or TORCH_FR_BUFFER_SIZE is 0"]
    places: dict[tuple[str, ...], list[Recorded]] = {}
    for one in recorded:
        places.setdefault(tuple(one.stack), []).append(one)
    for stack, there in sorted(places.items(), key=lambda place: len(place[1])):
        if stack:
            found.append(f"{ranks_named([one.rank for one in there])} ({there[0].where}) at:")
            found += [f"    {line}" for line in stack]
    return found


def _asked(run_dir: Path, ranks: list[int], seconds: float) -> list[Recorded]:
    """The answers of the ranks that answer."""
    folder, question = run_dir / FOLDER, secrets.token_hex(8)
    folder.mkdir(exist_ok=True)
    put_text(folder / QUESTION, question, is_lasting=False)
    deadline, answers = time.monotonic() + seconds, dict[int, Recorded]()
    while len(answers) < len(ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank in ranks:
            with suppress(OSError, ValueError, KeyError):  # not yet
                row = json.loads((folder / f"{rank}.json").read_text())
                if row["question"] == question:
                    where = f"{row['host']}, process {row['pid']}"
                    told = row["groups"], row["entries"] or [], row["time_ns"], row["stack"], where
                    answers[rank] = Recorded(rank, *told)
    return [answers[rank] for rank in sorted(answers)]
