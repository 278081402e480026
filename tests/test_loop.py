"""Whole runs of the tiny demo: resume after a kill is exact, Ctrl-C is clean, wrong inputs are named."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import forked, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).with_name("loop_driver.py")
SHORT = [
    "threads=1",
    "base.hidden_size=32",
    "base.steps=120",
    "base.texts_per_step=24",
    "base.heldout=4",
    "steps=8",
    "grpo.questions=4",
    "grpo.group_size=8",
    "grpo.minibatches=2",
    "grpo.kl_coef=0.01",
    "grpo.reference_every=4",
    "optimizer.lr=1e-2",
    "rollout.max_tokens=24",
    "evaluation.samples=2",
    "evaluation.every=4",
    "checkpoint.every=4",
    "log.tensorboard=false",
    "rewards.workers=1",
]


def run(
    run_dir: Path,
    *,
    ranks: int = 1,
    start: Callable[..., subprocess.CompletedProcess] = forked,
    kill: int = 0,
    at: int = 0,
    more: tuple[str, ...] = (),
) -> subprocess.CompletedProcess:
    config = ROOT / "configs" / "tiny_r1_zero.yaml"
    return start(ranks, DRIVER, kill, at, config, *SHORT, f"run_dir={run_dir}", *more)


def logged(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl without times and telemetry, and samples.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in r.items() if not k.startswith(("seconds/", "tokens_per", "gpu"))} for r in rows]
    return timeless, [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def last_checkpoint(run_dir: Path, world) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint that `latest` names: weights, optimizer state, reference."""
    from megatron.core import dist_checkpointing

    from r1engine.model.cpu import on_cpu

    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip() / "model"
    with on_cpu():
        tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder, start=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_run_writes_what_it_promises(whole):
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png", "report.html"):
        assert (whole / name).stat().st_size > 0, name
    summary = json.loads((whole / "summary.json").read_text())
    assert {f"{x}_{when}" for x in ("pass_at_1", "format", "length") for when in ("before", "after")} < set(summary)
    assert summary["logp_diff_max"] < 1e-4  # generator and trainer agree in float32
    trained, base = (AutoModelForCausalLM.from_pretrained(whole / name).state_dict() for name in ("model", "base"))
    assert not torch.equal(trained["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    assert AutoTokenizer.from_pretrained(whole / "model").eos_token == "<|end|>"
    rows, _ = logged(whole)
    assert [r["step"] for r in rows if "loss" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in rows if "eval/pass_at_1" in r] == [0, 4, 8]
    assert all(r["grad_norm"] > 0 for r in rows if r["step"] > 4 and "loss" in r)  # resume has something to get wrong


@pytest.mark.parametrize("ranks", [1, 2], ids=["one-rank", "dp2"])
def test_resume_after_a_kill_is_bit_exact(whole, tmp_path, world, ranks):
    reference = whole
    if ranks > 1:
        reference = tmp_path / "whole"
        shutil.copytree(whole / "base", reference / "base")
        assert run(reference, ranks=ranks).returncode == 0
    shutil.copytree(reference / "base", tmp_path / "killed" / "base")
    killed = run(tmp_path / "killed", ranks=ranks, kill=signal.SIGKILL, at=3)  # past the checkpoint of step 4
    assert killed.returncode != 0
    resumed = run(tmp_path / "killed", ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from step_00000004" in resumed.stdout
    assert logged(tmp_path / "killed") == logged(reference)
    expected, found = last_checkpoint(reference, world), last_checkpoint(tmp_path / "killed", world)
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_run_goes_on_in_another_layout(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    shutil.rmtree(root / "step_00000008")
    (root / "latest").write_text("step_00000004\n")
    done = run(tmp_path / "run", ranks=2, start=torchrun, more=("parallel.tensor=2",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from step_00000004" in done.stdout
    (expected, expected_samples), (found, samples) = logged(whole), logged(tmp_path / "run")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    assert [s["completion"] for s in samples] == [s["completion"] for s in expected_samples]


def test_ctrl_c_exits_clean_and_leaves_nothing_half_written(whole, tmp_path):
    shutil.copytree(whole / "base", tmp_path / "run" / "base")
    done = run(tmp_path / "run", kill=signal.SIGINT, at=3)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_00000004"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=5", "was made with"),
        ("checkpoint.resume=false", "holds checkpoints up to step_00000008"),
        ("grpo.kl_coef=0", "reference was True when it was made, this run has False"),
        ("rollout.max_staleness=1", "ahead was False when it was made, this run has True"),
        ("data.max_prompt_tokens=3", "required at most max_prompt_tokens = 3"),
    ],
)
def test_a_changed_run_is_refused_by_name(whole, override, message):
    done = run(whole, more=(override,))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_layout_that_does_not_fit_the_processes_is_refused(tmp_path):
    done = run(tmp_path, more=("parallel.tensor=2",))
    assert done.returncode == 2
    assert "tensor 2 x pipeline 1 = 2 does not divide the world size 1" in done.stderr


AHEAD = ("rollout.max_staleness=2", "rollout.oversample=1.5")


def test_a_run_one_step_ahead_loses_and_doubles_no_question_when_it_is_killed(whole, tmp_path):
    shutil.copytree(whole / "base", tmp_path / "base")
    killed = run(tmp_path, ranks=2, kill=signal.SIGKILL, at=3, more=AHEAD)
    assert killed.returncode != 0
    resumed = run(tmp_path, ranks=2, more=AHEAD)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from step_00000004" in resumed.stdout
    rows = [row for row in logged(tmp_path)[0] if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for iteration, row in enumerate(rows, start=1):
        assert row["questions/consumed"] == 4 * iteration
        dropped = row.get("questions/dropped_end_of_run", 0)
        assert row["questions/issued"] == row["questions/consumed"] + row["questions/carried"] + dropped
        assert row["staleness/max"] <= 2
    assert sum(row["tokens_ahead"] for row in rows) > 0
    state = json.loads((tmp_path / "checkpoints" / "step_00000008" / "state.json").read_text())["prompts"]
    assert state["epoch"] * state["count"] + state["position"] == rows[-1]["questions/issued"]
