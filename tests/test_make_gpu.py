"""`make gpu` on a machine that has little: what can run is run, whatever becomes of the rest, and in time."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_a_bare_machine_collects_the_tests_of_the_kernels_without_an_error(gpu):
    command = [sys.executable, "-m", "pytest", "-p", "bare_machine", "tests/gpu", "-m", "gpu", "--collect-only"]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'support'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "left out: test_policy_gpu.py needs megatron, pydantic, ruamel" in done.stdout
    assert len(gpu.KERNELS) == 5
    for kernels in gpu.KERNELS:
        assert f"<Module {Path(kernels).name}>" in done.stdout


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def test_make_gpu_is_one_call_with_a_time(tmp_path):
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "gpu", "SECONDS_LEFT=240"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "python3 benchmarks/gpu.py --seconds 240\n"


def test_a_section_that_fails_or_hangs_stops_no_other(gpu, monkeypatch, tmp_path, capsys):
    sections = (
        gpu.Section("fails", 60, "echo 'found 3, required 4'; exit 3"),
        gpu.Section("hangs", 0.5, f"(sleep 5; touch {tmp_path / 'late'}) & sleep 600"),
        gpu.Section("lacks", 60, "true", "no-such-program"),
        gpu.Section("sees", 60, "{python} -c 'import r1kernels, sys; print(sys.path)'"),
    )
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--seconds", "90", "--out", str(tmp_path)])
    assert gpu.main() == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.json").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["failed", "ended", "needs no-such-program", "done"]
    assert rows[0]["said"] == "found 3, required 4"
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["fails", "hangs", "lacks", "sees"]


def test_what_there_is_no_time_for_is_said(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--seconds", "0", "--out", str(tmp_path)])
    assert gpu.main() == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.json").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"no time"} and len(rows) == len(gpu.SECTIONS)


def test_the_sections_name_files_that_are_there(gpu):
    named = {word for s in gpu.SECTIONS for word in s.command.split() if word.startswith(("tests/", "benchmarks/"))}
    assert len(named) >= 7
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    assert sum(section.seconds for section in gpu.SECTIONS[:5]) <= 520  # what is least known always has its time


def test_benchmarks_end_in_time_with_the_rows_they_have(tmp_path):
    for name in ("run_all.py", "timing.py", "table.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    (tmp_path / "bench_a.py").write_text("import time\nprint('{\"row\": 1}')\ntime.sleep(600)\n")
    (tmp_path / "bench_b.py").write_text("print('{\"row\": 2}')\n")
    command = [sys.executable, tmp_path / "run_all.py", "--device", "cpu", "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "no time for bench_b.py" in done.stderr and "failed: bench_a.py" in done.stderr
    (kept,) = tmp_path.glob("results/*/a.json")
    assert json.loads(kept.read_text()) == {"row": 1}


@pytest.mark.parametrize(("measured", "runs"), [(50e-6, ["call", "replay"]), (1e-3, ["call"])])
def test_a_short_call_is_timed_without_pythons_gaps(monkeypatch, measured, runs):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    timing = importlib.import_module("timing")
    timed = []
    monkeypatch.setattr(timing, "_between_events", lambda run, rounds, warmup: timed.append(run()) or [measured])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    timing.cold_kernel_seconds(lambda: "call", rounds=1, warmup=0)
    assert timed == runs
