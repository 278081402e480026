"""`r1engine reward`: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r1engine.data.question import Question
from r1engine.rewards import Record
from r1engine.rewards.offline import read_records

ROOT = Path(__file__).resolve().parents[2]


def reward(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    code = "from r1engine.cli import main; main()"
    command = [sys.executable, "-c", code, "reward", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_file_is_scored_in_order_with_tables_and_the_undecided(tmp_path):
    text = "<think>We add the numbers and carry one.</think><answer>{}</answer>"
    source = write(
        tmp_path / "in.jsonl",
        {"id": "a", "reward": "math", "completion": text.format("5"), "answer": 5},
        {"id": "b", "reward": "math", "completion": text.format("6"), "answer": "5"},
        {"id": "c", "reward": "math", "completion": text.format("7 apples or 8"), "answer": "5"},
        {"id": "d", "reward": "math", "completion": text.format("1+x"), "answer": "x+1"},
        {"id": "e", "reward": "math", "completion": text.format("9^{9^{9}}"), "answer": "5"},
        {"reward": "choice", "completion": "\\boxed{B}", "answer": "B"},
        {"reward": "exact", "completion": "\\boxed{ab}", "answer": "ab"},
        {"reward": "format", "completion": "5"},
        {"reward": "language", "completion": text.format("5"), "language": "en"},
        {"reward": "math", "completion": "<think>\udcff", "answer": "5"},
    )
    out = tmp_path / "new" / "out.jsonl"
    done = reward(source, "--out", out, "workers=1", "deadline_seconds=60")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["verdict"], row["score"]) for row in rows] == [
        ("a", "right", 1.0),
        ("b", "wrong", 0.0),
        ("c", "wrong", 0.0),
        ("d", "right", 1.0),
        ("e", "undecided", None),
        ("6", "right", 1.0),
        ("7", "right", 1.0),
        ("8", "wrong", 0.0),
        ("9", "right", 1.0),
        ("10", "wrong", 0.0),
    ]
    assert set(rows[0]) == {"id", "reward", "verdict", "score", "components", "reason", "seconds"}
    assert rows[3]["components"] == {"format": 1.0, "accuracy": 1.0} and rows[8]["components"] == {"language": 1.0}
    assert all(row["seconds"] >= 0 and row["reason"] for row in rows)
    assert not list(tmp_path.rglob("*.partial"))
    cells = re.sub(r"[^\w.:#/ \n]", " ", done.stdout)
    assert re.search(r"math +6 +2 +3 +1 ", cells)
    assert re.search(r"math +accuracy +5 +0.400", cells) and re.search(r"language +language +1 +1.000", cells)
    assert "1 x # is not #; format: " in done.stdout or "1 x # is not #\n" in done.stdout
    assert "undecided: 1" in done.stdout and "e: the answer has a power in an exponent" in done.stdout


def test_samples_of_raw_questions_are_graded_as_a_run_would(tmp_path):
    raw = {"question": "1+1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
    source = write(tmp_path / "in.jsonl", raw | {"completion": "\\boxed{2}"}, raw | {"completion": "two"})
    done = reward(source, "--out", tmp_path / "out.jsonl", "workers=1", "deadline_seconds=60")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["reward"], row["verdict"]) for row in rows] == [("math", "right"), ("math", "wrong")]
    assert "1 x no answer block and no \\boxed{}" in done.stdout


def test_row_of_a_record_is_read_as_the_same_record(tmp_path):
    # So that undecided.jsonl of a run can be graded again.
    made = Record(Question("q", "5", "math", None, "zh"), "a\udcff", "Solve: q <think>", id="7/1")
    code = Record(Question("", reward="code", tests={"tests": [{"stdout": "1"}]}), "b", id="8/0")
    assert read_records(write(tmp_path / "rows.jsonl", made.as_row(), code.as_row())) == [made, code]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reward": "mathz", "completion": "a"}, "found reward 'mathz', required one of math, choice, exact, format"),
        ({"reward": "math", "completion": "a"}, "found no `answer`, required by reward 'math'"),
        ({"reward": "math", "completion": 5, "answer": "5"}, "completion is 5, required a text"),
        ({"completion": "a"}, "found no `answer`, required by reward 'math'"),
        ({"reward": "math", "completion": "a", "answer": [1]}, "answer is [1], required a number or a text"),
        ({"reward": "language", "completion": "a", "language": "xx"}, "found language 'xx', required one of ar, be"),
        ([1], "found list, required an object with `reward` and `completion`"),
    ],
)
def test_bad_record_names_its_line(tmp_path, row, message):
    good = {"reward": "format", "completion": "a"}
    done = reward(write(tmp_path / "in.jsonl", good, row), "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert f"in.jsonl:2: {message}" in " ".join(done.stderr.split())
    assert not (tmp_path / "out.jsonl").exists() and "Traceback" not in done.stderr


def test_bad_file_is_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"reward": \n')
    cases = {
        ("no.jsonl", "out.jsonl"): "no.jsonl: found no such file, required a .jsonl file of completions",
        ("in.jsonl", "out.jsonl"): "in.jsonl: found no records, required at least one",
        ("broken.jsonl", "out.jsonl"): "broken.jsonl:1: not valid JSON",
        ("in.jsonl", "in.jsonl"): "in.jsonl: found the input itself, required another file",
    }
    for (source, out), message in cases.items():
        done = reward(tmp_path / source, "--out", tmp_path / out)
        assert done.returncode == 2 and message in done.stderr
