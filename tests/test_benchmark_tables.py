"""What benchmarks share: CPU seconds, the table of the terminal, and two files of rows compared."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ABOUT = {"device": "A x 2", "threads": 1, "versions": {"torch": "2.13.0"}, "date": "2026-11-29 08:00"}


def row(name: str, median: float, spread: float, **values: object) -> dict[str, object]:
    times = {"median": median, "q1": median - spread, "q3": median + spread, "rounds": 5}
    return {"benchmark": "op", "row": name, **times, **values, **ABOUT}


def test_a_table_says_once_where_it_was_measured_and_heads_its_columns_once():
    spec = importlib.util.spec_from_file_location("table", BENCHMARKS / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    made = table.Table()
    lines = made.add(row("ours", 0.0123, 0.001, tokens=8, ratio=1.5)).splitlines()
    assert lines[0] == "op: device A x 2, threads 1, date 2026-11-29 08:00; torch 2.13.0"
    assert lines[2].split() == ["row", "median", "tokens", "ratio"]
    assert lines[3].split("  ")[0] == "ours" and "12.3 ms (11.3 ms to 13.3 ms)" in lines[3]
    assert lines[3].split()[-2:] == ["8", "1.5"]
    assert len(lines[2]) == len(lines[3])  # right-aligned under its heading
    (again,) = made.add(row("theirs", 2e-6, 1e-7, tokens=8, ratio=0.5)).splitlines()
    assert "2 us (1.9 us to 2.1 us)" in again
    assert made.add(row("other", 1.0, 0.1, bytes=3)).splitlines()[1].split() == ["row", "median", "bytes"]


SHORT_AND_CHILD = """
import subprocess, sys, timing
for work in (lambda: sum(range(1000)), lambda: subprocess.run([sys.executable, "-c", "pass"])):
    before = timing.cpu_seconds()
    work()
    print(timing.cpu_seconds() - before)
"""


def test_a_short_call_takes_cpu_seconds_and_a_child_takes_its_own():
    command = [sys.executable, "-c", SHORT_AND_CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    short, child = map(float, done.stdout.split())
    assert 0 < short < child  # rates are divided by it: os.times says 0 for the first


def compare(tmp_path: Path, before: list[dict], after: list[dict]) -> subprocess.CompletedProcess[str]:
    files = tmp_path / "before.json", tmp_path / "after.json"
    for file, rows in zip(files, (before, after), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return subprocess.run([sys.executable, BENCHMARKS / "compare.py", *files], capture_output=True, text=True)


def test_two_files_are_compared_by_what_is_no_measurement(tmp_path):
    before = [row("ours", 2.0, 0.1, tokens=8, gb_per_s=1.0), row("ours", 3.0, 0.1, tokens=16), row("gone", 1.0, 0.1)]
    after = [row("ours", 3.1, 0.1, tokens=16), row("ours", 1.0, 0.1, tokens=8, gb_per_s=2.0), row("new", 1.0, 0.1)]
    lines = compare(tmp_path, before, after).stdout.splitlines()
    assert lines == [
        " 0.500x       2 s ->      1 s  op ours  tokens=8",
        " 1.033x       3 s ->    3.1 s  within the quartiles  op ours  tokens=16",
        "only in the first: op gone",
        "only in the second: op new",
    ]


def test_shares_of_the_floor_are_drawn_by_size(tmp_path):
    rows = [row("ours", 1.0, 0.1, tokens=n, of_copy=0.5 + n / 100, backward=True) for n in (16, 8)]
    file, picture = tmp_path / "rows.json", tmp_path / "share.svg"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*rows, row("no floor", 1.0, 0.1, tokens=8)]))
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import plot
    finally:
        sys.path.remove(str(BENCHMARKS))
    found = plot.lines([file])
    assert found == {"op": {"ours + backward": [(8, 0.58), (16, 0.66)]}}
    plot.draw(found, picture)
    assert picture.read_text().count("<svg") == 1
    file.write_text(json.dumps(row("no floor", 1.0, 0.1, tokens=8)) + "\n")
    with pytest.raises(ValueError, match=r"found no row with a share, required of_copy or of_copy_rate and a size"):
        plot.lines([file])


def test_other_machines_and_files_of_something_else_are_named(tmp_path):
    other = row("ours", 2.0, 0.1) | {"threads": 8}
    assert compare(tmp_path, [row("ours", 2.0, 0.1)], [other]).stdout.splitlines()[0] == (
        "measured on different machines: A x 2, 1 threads; A x 2, 8 threads"
    )
    done = compare(tmp_path, [row("ours", 2.0, 0.1)], [["no row"]])
    assert done.returncode == 1
    assert done.stderr == f"compare: {tmp_path}/after.json:1: found '[\"no row\"]', required a line of --json\n"
