"""heartbeat.json says where a run was when it last moved, and costs at most one file a second."""

import json

from r1engine.observe.heartbeat import Heartbeat
from r1engine.observe.progress import Progress


def test_it_moves_with_the_run_at_most_once_a_second(tmp_path):
    times = iter([0.0, 0.0, 0.5, 2.0, 2.0, 9.0, 9.0])
    beating = Heartbeat(tmp_path, lambda: next(times))
    found = []
    with Progress("demo", enabled=True) as progress:
        progress.heartbeat = beating
        progress.start(4, 10)
        progress.phase("generate", total=100)  # 0.0
        found.append(json.loads((tmp_path / "heartbeat.json").read_text()))
        progress.advance(30)  # 0.5: too soon
        found.append(json.loads((tmp_path / "heartbeat.json").read_text()))
        progress.advance(30)  # 2.0
        found.append(json.loads((tmp_path / "heartbeat.json").read_text()))
        progress.step(5, {})  # 9.0
        found.append(json.loads((tmp_path / "heartbeat.json").read_text()))
    assert [(row["phase"], row["done"], row["step"], row["steps"]) for row in found] == [
        ("generate", 0, 4, 10),
        ("generate", 0, 4, 10),
        ("generate", 60, 4, 10),
        ("generate", 60, 5, 10),
    ]
    assert found[0].keys() == {"time", "phase", "done", "step", "steps", "host", "pid"}


def test_it_ends_no_run(tmp_path):
    Heartbeat(tmp_path / "not there").beat("load", 0, 0, 0)
    (tmp_path / "heartbeat.json").mkdir()  # in the place of the file that is written
    Heartbeat(tmp_path).beat("load", 0, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]
