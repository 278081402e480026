"""The plan of a whole pipeline: each stage takes what its own plan says, for as much work as is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config import ConfigError, load
from r1engine.config.pipeline import load_pipeline
from r1engine.hf.architecture import architecture_of
from r1engine.plan.hardware import GPUS, Assumed
from r1engine.plan.planner import make_plan
from r1engine.plan.request import TEXTS, job_of, layout_of
from r1engine.plan.stages import Cluster, cost_of

ROOT = Path(__file__).resolve().parents[2]
R1 = ROOT / "configs" / "r1.yaml"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def stages() -> dict:
    done = CliRunner().invoke(app, ["plan", str(R1), "--gpus", "512", "--gpu", "h800", "--json"])
    assert done.exit_code == 0, done.output
    return {row["stage"]: row for row in json.loads(done.stdout)}


def test_every_stage_of_the_paper_is_planned_or_says_why_not(stages):
    assert [*stages] == [stage.name for stage in load_pipeline(R1, []).stages]
    assert all(row["fits"] for row in stages.values())
    unplanned = {name: row["note"] for name, row in stages.items() if row["hours"] is None}
    assert unplanned == {
        "cold_data": "CPUs, and a server that rewrites", "sft_data": "CPUs", "pairs": "a server that judges",
    }  # fmt: skip
    assert {name for name, row in stages.items() if not row["is_whole"]} == {
        "cold_samples", "dev1", "samples", "general_answers", "helpful", "table",
    }  # fmt: skip
    assert stages["r1"]["gpu_hours"] == pytest.approx((512 + 8 * 16) * stages["r1"]["hours"])  # with the servers
    for name, paper in {"r1_zero": 101_000, "r1": 41_000}.items():  # the order of magnitude that the paper tells
        assert paper / 3 < stages[name]["gpu_hours"] < 3.3 * paper


def test_hours_are_those_of_the_stages_alone(stages):
    cfg = load(ROOT / "configs" / "r1_zero_671b.yaml", [])
    seconds = []
    for limit in (32_768, 65_536):
        limited = cfg.rollout.model_copy(update={"max_tokens": limit})
        part = cfg.model_copy(update={"rollout": limited, "max_row_tokens": 67_584})  # a row of the whole run
        assumed = Assumed(generator_gpus=16)
        arch, job = architecture_of(cfg.model), job_of(part, assumed)
        seconds.append(make_plan(arch, layout_of(part, 512), job, GPUS["h800"], assumed).seconds)
    zero = next(stage for stage in load_pipeline(R1, []).stages if stage.name == "r1_zero")
    cost = cost_of(zero, load_pipeline(R1, []), Cluster(512, GPUS["h800"], Assumed(generator_gpus=16)))
    assert cost.hours == pytest.approx((8_200 / 16 * seconds[0] + 2_200 / 16 * seconds[1]) / 3600)  # 16 steps a rollout
    small = load(ROOT / "configs" / "distill" / "qwen2.5_math_1.5b.yaml", [])
    plan = make_plan(
        architecture_of(small.model), layout_of(small, 512), job_of(small, Assumed()), GPUS["h800"], Assumed()
    )
    assert stages["qwen_1.5b"]["hours"] == pytest.approx(2 * TEXTS / 64 * plan.seconds / 3600)
    assert stages["dev3"]["work"] == f"2 x {TEXTS:,} texts"  # the mixture's counts are Table 5's
    works = [stages[name]["work"] for name in ("helpful", "harmless")]
    assert works == ["1 x 1,000 pairs", "1 x 106,000 labels"]
    assert stages["dev1"]["work"] == "2 x 1,000 texts"  # how many the cold start leaves, nobody knows


def test_what_cannot_run_is_named():
    planned = CliRunner().invoke(app, ["plan", str(R1), "--gpus", "100", "--gpu", "h800"])
    assert planned.exit_code == 2 and "stage r1_zero: " in planned.stderr
    asked = CliRunner().invoke(app, ["plan", str(R1), "--gpus", "512", "--auto"])
    assert asked.exit_code == 2 and "found --auto or --html with a pipeline" in asked.stderr
    with pytest.raises(ConfigError, match="found --gpu x1"):
        from r1engine.plan.stages import plan_pipeline

        plan_pipeline(load_pipeline(R1, []), 512, "x1", assume=[], as_json=True)


def test_a_plan_that_does_not_fit_says_so_and_exits_with_one():
    done = CliRunner().invoke(app, ["plan", str(R1), "stages.r1.max_row_tokens=400000", "--gpus", "512"])
    assert done.exit_code == 1 and "stage r1 does not fit: GPU memory in update" in done.stdout
    told = " ".join(done.stdout.split())
    assert "the paper (v2, B.4.4), in H800 hours: R1-Zero 101K, data for supervised training 5K, R1 41K" in told
