"""A plan of supervised training: the update of reinforcement learning, and nothing of generation."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from ranks import on_ranks

from r1engine.config import ConfigError, RlConfig, SftConfig
from r1engine.hf.architecture import read_architecture
from r1engine.plan.command import run_plan
from r1engine.plan.hardware import GPUS, Assumed
from r1engine.plan.phases import model_flops
from r1engine.plan.planner import make_plan
from r1engine.plan.request import TEXT_TOKENS, job_of, layout_of
from r1engine.plan.search import search
from r1engine.plan.utilization import training_flops

MODEL = Path(__file__).resolve().parents[2] / "configs" / "models" / "Llama-3.1-8B"


def config(**sections: dict) -> SftConfig:
    return SftConfig(model={"path": MODEL, "recompute": True} | sections.pop("model", {}), **sections)


def test_a_step_is_the_update_of_reinforcement_learning_on_the_same_tokens():
    cfg = config(parallel={"tensor": 4}, sft={"batch_size": 64})
    arch, assumed, gpu = read_architecture(MODEL), Assumed(), GPUS["h100"]
    job = job_of(cfg, assumed)
    assert (job.completions, job.tokens, job.row_tokens) == (64, 64 * TEXT_TOKENS, 32_768)
    plan = make_plan(arch, layout_of(cfg, 8), job, gpu, assumed)
    assert [phase.name for phase in plan.phases] == ["update", "optimizer"]
    other = RlConfig(model=cfg.model, parallel=cfg.parallel)
    rl = replace(job, generator_tensor=1, has_reference=True)
    sampled = make_plan(arch, layout_of(other, 8), rl, gpu, assumed)
    assert plan.worst.training == sampled.worst.training and plan.host_gib == {}
    update = {phase.name: phase.seconds for phase in sampled.phases}["update"]
    assert plan.phases[0].seconds == update
    assert model_flops(arch, job) == pytest.approx(training_flops(arch, [TEXT_TOKENS] * 64), rel=1e-3)


def test_any_batch_fits_any_ranks_and_a_search_needs_no_generator():
    cfg = config(sft={"batch_size": 7})
    arch, assumed = read_architecture(MODEL), Assumed(mean_tokens=1000.0)
    job = job_of(cfg, assumed)
    assert job.mean_tokens == 1000
    plans = search(arch, job, 8, GPUS["h100"], assumed)
    assert plans and all(plan.fits and plan.job.generator_tensor == 0 for plan in plans)


def _printed(html: Path, as_json: bool) -> str:
    """In a process of its own: the plan builds Megatron's modules on paper, without ranks."""
    cfg = config(parallel={"tensor": 4, "distributed_optimizer": True}, sft={"batch_size": 64})
    with redirect_stdout(StringIO()) as out:
        assert run_plan(cfg, 8, "h100", auto=False, assume=[], as_json=as_json, html=html)
    return out.getvalue()


def test_the_command_prints_a_step_and_the_papers_epochs(tmp_path):
    text = " ".join(on_ranks(1, _printed, tmp_path / "plan.html", False)[0].split())
    assert "one step: 64 texts of 5,355 tokens on average, 32,768 at most" in text
    assert "2 epochs of the paper's 804,745 texts: " in text and "generat" not in text.partition("assumed:")[0]
    found = json.loads(on_ranks(1, _printed, tmp_path / "plan.html", True)[0])
    assert set(found["phase_seconds"]) == {"update", "optimizer"} and 0 < found["mfu_update"] < 1


def test_texts_longer_than_the_positions_are_refused_with_both_ways_out():
    cfg = config(model={"path": MODEL.parent / "Qwen2.5-Math-7B"})
    with pytest.raises(
        ConfigError,
        match=r"4,096 positions, required 32,768 \(data.max_tokens\); lower data.max_tokens, or set model.max_pos",
    ):
        run_plan(cfg, 8, "h100", auto=False, assume=[], as_json=False, html=None)
