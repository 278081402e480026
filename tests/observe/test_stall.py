"""`r1engine doctor RUN_DIR` names the rank that the others wait for, and the collective."""

import json
import pickle
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.observe.asked import Answers
from r1engine.observe.heartbeat import Heartbeat
from r1engine.observe.progress import Progress
from r1engine.observe.stall import lines, read_beats, verdict

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
    told = lines(tmp_path, seconds=0.2)
    assert "rank 0 waits in train for rank 1" in told[0]
    assert [line for line in told[1:3] if "process 7" in line] == told[1:3]
    assert told[3:] == ["no rank answers within 0 s: the run has ended, or all its processes are stopped"]


def stand_still(folder: Path) -> list[str]:
    """Three ranks, of which rank 1 does not come to a sum; what the first one sees of it from outside."""
    from r1engine import ranks

    world = ranks.start(timeout_minutes=2)
    for rank in range(3):  # the first one takes away what others have left
        if rank == world.rank:
            Heartbeat(folder, rank=rank).beat("train", 0, 4, 9)
        world.wait()
    group = dist.new_group([0, 1], group_desc="pair")
    answers = Answers(folder, world.rank, every_seconds=0.05)
    store, told = dist.distributed_c10d._get_default_store(), list[str]()
    if world.rank == 0:
        asker = threading.Thread(target=lambda: told.extend(lines(folder, seconds=60)))
        asker.start()
        threading.Thread(target=lambda: (asker.join(), store.set("told", "")), daemon=True).start()
    if world.rank == 1:
        store.wait(["told"])
    if world.rank < 2:
        dist.all_reduce(torch.ones(5), group=group)
    else:
        store.wait(["told"])
    world.wait()
    answers.close()
    ranks.stop()
    return told


def test_a_run_that_stands_still_says_which_rank_waits_for_which_collective(tmp_path):
    told = on_ranks(3, stand_still, tmp_path)[0]
    (waits,) = [line for line in told if "gloo:all_reduce" in line]
    assert re.fullmatch(
        r"rank 0 waits for \d+ s in gloo:all_reduce \[\[5\]\], number 1 of group 1 \(pair\), for rank 1", waits
    )
    at = "\n".join(told[told.index(waits) + 1 :])
    assert at.count(" stand_still") == 3 and "store.wait" not in at
    assert at.count(") at:") == 3 and "all_reduce" in at


def test_a_rank_that_begins_after_the_question_answers_it(tmp_path):
    run_of(tmp_path, [(0, "train", 4)])
    told = list[str]()
    asker = threading.Thread(target=lambda: told.extend(lines(tmp_path, seconds=60)))
    asker.start()
    while asker.is_alive() and not (tmp_path / "stall" / "ask").exists():
        asker.join(0.01)
    answers = Answers(tmp_path, 0, every_seconds=0.01)
    asker.join()
    answers.close()
    assert any(line.endswith(") at:") for line in told), told


def entry(number: int, name: str = "nccl:all_reduce", *, group: str = "3", is_done: bool = False) -> dict:
    """What is read of an entry of PyTorch 2.13's recorder."""
    return {
        "frames": [],
        "record_id": number,
        "process_group": (group, "undefined"),
        "collective_seq_id": number,
        "profiling_name": name,
        "time_created_ns": 10**9,
        "input_sizes": [[8]],
        "state": "completed" if is_done else "started",
        "retired": is_done,
        "is_p2p": False,
    }


def dump(folder, rank: int, entries: list[dict]) -> None:
    config = {"3": {"name": "3", "desc": "undefined", "ranks": "[0, 2, 5]"}}
    trace = {"version": "2.10", "pg_config": config, "pg_status": {}, "entries": entries}
    (folder / f"nccl_trace_rank_{rank}").write_bytes(pickle.dumps(trace, protocol=2))


def test_dumps_of_a_timeout_name_the_rank_that_did_not_come(tmp_path):
    for rank in (0, 5):
        dump(tmp_path, rank, [entry(6, is_done=True), entry(7)])
    dump(tmp_path, 2, [entry(6, is_done=True)])
    assert lines(tmp_path) == ["ranks 0, 5 wait in nccl:all_reduce [[8]], number 7 of group 3, for rank 2"]
    dump(tmp_path, 2, [entry(6, is_done=True), entry(7, "nccl:broadcast")])
    assert lines(tmp_path) == [
        "the ranks of group 3 went different ways: ranks 0, 5 in nccl:all_reduce [[8]]; rank 2 in nccl:broadcast [[8]]"
    ]
    dump(tmp_path, 2, [entry(6, is_done=True), entry(7)])
    assert lines(tmp_path) == ["no rank waits in a collective that another has not come to"]


def test_a_dump_is_read_without_running_it(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path(tmp_path, "ran").touch, ()

    dump(tmp_path, 0, [entry(7) | {"state": Hostile()}])
    with pytest.raises(ValueError, match=r"nccl_trace_rank_0: found no dump of a flight recorder: it names "):
        lines(tmp_path)
    assert not (tmp_path / "ran").exists()
