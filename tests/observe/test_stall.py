"""`r1engine doctor RUN_DIR` names the rank that the others wait for."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.observe.heartbeat import Heartbeat
from r1engine.observe.progress import Progress
from r1engine.observe.stall import read_beats, verdict

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def run_of(folder, places):
    """A run whose ranks stand at (seconds after noon, phase, step)."""
    (folder / "heartbeats").mkdir()
    for rank, (seconds, phase, step) in enumerate(places):
        name = f"heartbeats/{rank}.json" if rank else "heartbeat.json"
        time = (NOON + timedelta(seconds=seconds)).isoformat()
        row = {"time": time, "phase": phase, "done": 0, "step": step, "steps": 9, "host": f"node{rank // 2}", "pid": 7}
        (folder / name).write_text(json.dumps(row))


def test_the_rank_that_is_behind_is_named(tmp_path):
    run_of(tmp_path, [(60, "train", 4), (61, "train", 4), (9, "generate", 4), (62, "train", 4)])
    beats = read_beats(tmp_path)
    assert [beat.rank for beat in beats] == [2, 0, 1, 3]
    assert verdict(beats, NOON + timedelta(seconds=662)) == (
        "nothing has moved for 600 s; ranks 0, 1, 3 wait in train for rank 2, still in generate after step 4: look "
        "there first (rank 2 on node1, process 7)"
    )


def test_ranks_at_one_place_are_told_so(tmp_path):
    run_of(tmp_path, [(0, "train", 4), (1, "train", 4)])
    assert verdict(read_beats(tmp_path), NOON + timedelta(seconds=31)) == (
        "nothing has moved for 30 s; all 2 ranks are in train after step 4"
    )


def test_every_rank_writes_its_phase_at_once(tmp_path):
    with Progress("demo", enabled=False) as progress:
        progress.heartbeat = Heartbeat(tmp_path, rank=3)
        progress.start(4, 10)
        for phase in ("generate", "train"):  # within a second
            progress.phase(phase)
            row = json.loads((tmp_path / "heartbeats" / "3.json").read_text())
            assert (row["phase"], row["step"]) == (phase, 4)


@pytest.mark.parametrize("text", ["{}", "no", '{"time": 3}'])
def test_what_is_no_heartbeat_is_named(tmp_path, text):
    assert "found no heartbeat.json, required the folder of a run" in asked(tmp_path)
    (tmp_path / "heartbeat.json").write_text(text)
    assert "heartbeat.json: found no heartbeat: " in asked(tmp_path)


def asked(folder) -> str:
    done = CliRunner().invoke(app, ["doctor", str(folder)])
    assert done.exit_code == 2
    return " ".join(done.stderr.split())


def test_the_command_prints_a_line_a_rank(tmp_path):
    run_of(tmp_path, [(60, "train", 4), (9, "generate", 4)])
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert (
        done.exit_code == 0
        and done.stdout.count("process 7") == 3
        and "rank 0 waits in train for rank 1" in done.stdout
    )
