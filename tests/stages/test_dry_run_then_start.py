"""Where the dry run of a shipped configuration finds nothing, the start goes well; a pipeline's stages likewise."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import forked
from typer.testing import CliRunner

from r1engine.cli import app

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "killed.py"
SHORT = ["steps=1", "grpo.questions=4", "grpo.group_size=4", "evaluation.samples=2", "rewards.workers=1", "threads=1"]
TINY = ["stages.tiny.hidden_size=32", "stages.tiny.texts=96", "stages.tiny.heldout=4"]
PIPELINES = {  # ranks and overrides
    "demo": (1, [*TINY, "stages.tiny.layers=1", "stages.base.threads=1"]),
    "demo_moe": (2, [*TINY, "stages.tiny.intermediate_size=32"]),
}


def r1engine(ranks: int, *arguments: object) -> None:
    """Run a command, which must go well."""
    done = forked(ranks, DRIVER, 0, 0, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.turn(n)) for n, name in enumerate(PIPELINES)])
def test_a_dry_run_that_passes_is_followed_by_a_start_that_passes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    ranks, settings = PIPELINES[name]
    settings = [*settings, f"run_dir={tmp_path}", "stages.base.optimizer.warmup_steps=1"]
    settings += [f"stages.r1_zero.{setting}" for setting in [*SHORT, "optimizer.warmup_steps=1"]]
    command = ["pipeline", f"configs/{name}.yaml", *settings]
    if name == "demo_moe":
        monkeypatch.setenv("WORLD_SIZE", "2")
    told = CliRunner().invoke(app, [*command, "--dry-run"])
    assert told.exit_code == 0, told.output
    assert told.stderr.count("which is to be made") == 5
    assert not list(tmp_path.iterdir())
    r1engine(ranks, *command)
    if name == "demo_moe":
        return
    made = [f"model.path={tmp_path}/base/model", f"data.train={tmp_path}/tiny/train.jsonl"]
    made += [f"data.heldout={tmp_path}/tiny/heldout.jsonl", f"run_dir={tmp_path}/alone", *SHORT]
    alone = ["train", "configs/tiny_r1_zero.yaml", *made, "optimizer.warmup_steps=1"]
    dry = CliRunner().invoke(app, [*alone, "--dry-run", "--live"])
    assert (dry.exit_code, dry.stderr) == (0, "dry run: found nothing that stops a start\n")
    assert "seed: 0" in dry.stdout
    assert not (tmp_path / "alone").exists()
    r1engine(1, *alone)
