"""`make gpu` on a machine that has little: what can run is run, and the benchmarks run whatever the tests say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_bare_machine_collects_the_tests_of_the_kernels_without_an_error():
    command = [sys.executable, "-m", "pytest", "-p", "bare_machine", "tests/gpu", "-m", "gpu", "--collect-only"]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'support'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "left out: test_policy_gpu.py needs megatron, pydantic, ruamel" in done.stdout
    for kernels in ("test_moe_gpu.py", "test_logprob_gpu.py", "test_loss_ops_gpu.py", "test_moe_experts_gpu.py"):
        assert f"<Module {kernels}>" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_the_benchmarks_run_although_a_test_fails(tmp_path):
    calls = tmp_path / "calls"
    for name in ("python", "cmake"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\ncase "$*" in *pytest*) exit 1;; esac\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["make", "gpu", f"PYTHON={tmp_path / 'python'}", "SECONDS_LEFT=240"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    *_, tests, benchmarks = calls.read_text().splitlines()
    assert tests == "python -m pytest tests/gpu -m gpu"
    assert benchmarks == "python benchmarks/run_all.py --device cuda --seconds 240"


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
