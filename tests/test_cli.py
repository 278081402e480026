"""The console script and the torchrun entry: what they answer, and that they answer without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1engine.config import TinyConfig
from r1engine.demo.tiny import write_model

ROOT = Path(__file__).resolve().parents[1]
ENTRY = """
import sys
from r1engine.cli import main
try:
    main()
finally:
    print("torch loaded:", "torch" in sys.modules, file=sys.stderr)
"""


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "120", "NO_COLOR": "1", **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120, cwd=cwd)


def r1engine(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-c", ENTRY, *arguments, cwd=cwd, **environment)


@pytest.fixture
def config(tmp_path):
    write_model(tmp_path, TinyConfig(hidden_size=32, layers=1))
    path = tmp_path / "run.yaml"
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": 2}\n')
    path.write_text(
        f"model: {{path: {tmp_path}}}\ndata: {{train: {tmp_path / 'train.jsonl'}}}\n"
        "rollout: {max_tokens: 32}\nseed: 7\n"
    )
    return str(path)


ALL_KINDS = "rl, sft, reward_model, process_reward, sample, search, search_data, label, evaluate, tiny, tiny_r1, "
ALL_KINDS += "tiny_chain, tiny_chain_truth, tiny_chain_report, curate, pairs"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "train"),
        (["train", "--help"], 0, "--dry-run"),
        (["train", "CONFIG", "--dry-run"], 0, "seed: 7"),
        (["config", "CONFIG"], 0, "kl_coef: 0.001"),
        (["config", "--defaults"], 0, "GRPO clip ratio to 10"),
        (["train", "CONFIG", "grpo.klcoef=1"], 2, "unknown key grpo.klcoef; did you mean 'kl_coef'?"),
        (["config", "CONFIG", "seed=-1"], 2, "seed: found -1"),
        (["config", "--defaults", "sft"], 0, "2 to 3"),
        (
            ["config", "--defaults", "dpo"],
            2,
            f"found dpo, required one of {ALL_KINDS}",
        ),
        (["config"], 2, "required CONFIG, or --defaults and a kind of stage"),
        (["pipeline", "DEMO", "--dry-run"], 0, "r1_zero"),
        (["pipeline", "DEMO", "stages.base.sft.epoch=1"], 2, "stage base: override 'stages.base.sft.epoch=1'"),
        (["train", "no.yaml"], 2, "no.yaml: found no such file"),
        (["report", "no_run"], 2, "found no metrics.jsonl in no_run"),
    ],
)
def test_answers_without_loading_torch(config, arguments, status, text):
    names = {"CONFIG": config, "DEMO": str(ROOT / "configs" / "demo.yaml")}
    done = r1engine(*[names.get(argument, argument) for argument in arguments], cwd=ROOT)
    assert done.returncode == status, done.stderr
    assert text in (done.stderr if status else done.stdout)
    assert "torch loaded: False" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_error_is_printed_by_one_rank_only(config):
    first, second = (r1engine("train", config, "seed=-1", RANK=rank) for rank in ("0", "1"))
    assert "error: override 'seed=-1'" in first.stderr
    assert "error" not in second.stderr
    assert (first.returncode, second.returncode) == (2, 2)


def test_world_size_is_checked_before_anything_is_loaded(config):
    done = r1engine("train", config, "parallel.tensor=2", WORLD_SIZE="3", RANK="0")
    assert done.returncode == 2
    assert "does not divide the world size 3" in done.stderr
    assert "torch loaded: False" in done.stderr


def test_input_files_are_checked_before_anything_is_loaded(config):
    done = r1engine("train", config, "data.train=/no/such.jsonl")
    assert done.returncode == 2
    assert "data.train: found no file /no/such.jsonl" in done.stderr
    assert "torch loaded: False" in done.stderr


def test_resolved_config_is_a_config(config, tmp_path):
    first = r1engine("config", config, "grpo.kl_coef=0.5").stdout
    (tmp_path / "resolved.yaml").write_text(first)
    assert r1engine("config", str(tmp_path / "resolved.yaml")).stdout == first


@pytest.mark.parametrize("arguments", [["--help"], ["CONFIG", "seed=8", "--dry-run"], ["CONFIG", "sed=8"]])
def test_torchrun_entry_does_what_the_command_does(config, arguments):
    arguments = [config if argument == "CONFIG" else argument for argument in arguments]
    script, command = run(str(ROOT / "r1engine" / "train.py"), *arguments), r1engine("train", *arguments)
    assert script.returncode == command.returncode
    if arguments == ["--help"]:
        assert "KEY=VALUE" in script.stdout
    else:
        assert script.stdout == command.stdout
        assert script.stderr == command.stderr.replace("torch loaded: False\n", "")


def test_script_puts_the_root_on_the_path_and_not_the_package():
    code = (
        "import runpy, sys; sys.argv = ['r1engine/train.py', '--help']; sys.path[0] = 'r1engine'\n"
        "try: runpy.run_path('r1engine/train.py', run_name='__main__')\n"
        "except SystemExit: print('path:', sys.path[0], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"path: {ROOT} False" in done.stdout


def test_doctor_names_what_it_looked_for():
    done = r1engine("doctor")
    assert done.returncode == 0, done.stderr
    looked_for = ["torch", "megatron-core", "sglang", "GPUs", "CPU cores", "memory", "free disk"]
    looked_for += ["compiled CPU", "compiled CUDA", "attention on a GPU", "torch.nn.attention.varlen of PyTorch"]
    for name in [*looked_for, "model.fp8"]:
        assert name in done.stdout
    # Brackets are no markup of the table's.
    assert "transformer-engine[pytorch]" in done.stdout or "can run" in done.stdout


def test_report_writes_the_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "seconds/total": 1.0}\n')
    done = r1engine("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "report.html") in done.stdout.split()
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}], ids=str)
def test_threads_that_wait_leave_the_core_to_others_unless_the_user_says_otherwise(own, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    done = run("-c", "import r1engine, os; print(os.environ.get('GOMP_SPINCOUNT'))", **own)
    assert done.stdout.strip() == (str(own.get("GOMP_SPINCOUNT")) if own else "5000")


def test_of_several_ranks_the_first_alone_prints_the_config_of_a_dry_run(config):
    first, second = (r1engine("train", config, "--dry-run", RANK=rank) for rank in "01")
    assert "seed: 7" in first.stdout and "found nothing that stops a start" in first.stderr
    assert (second.stdout, second.stderr, second.returncode) == ("", "torch loaded: False\n", 0)
