"""A plan of supervised training and of reward models: the update of reinforcement learning, without generation."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from ranks import on_ranks

from r1engine.config import ConfigError, ProcessRewardConfig, RewardModelConfig, RlConfig, SftConfig
from r1engine.hf.architecture import read_architecture
from r1engine.plan.command import run_plan
from r1engine.plan.hardware import GPUS, Assumed
from r1engine.plan.phases import model_flops
from r1engine.plan.planner import knobs, make_plan
from r1engine.plan.request import TEXT_TOKENS, job_of, layout_of, trained_part
from r1engine.plan.search import search
from r1engine.plan.sizes import total_parameters
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


def test_a_reward_model_has_a_score_in_place_of_the_output_matrix_and_whole_pairs():
    cfg = RewardModelConfig(model={"path": MODEL, "recompute": True}, parallel={"tensor": 2})
    language, assumed, gpu = read_architecture(MODEL), Assumed(), GPUS["h100"]
    arch = trained_part(language, cfg)
    matrix = language.vocab_size * language.hidden_size
    assert total_parameters(arch) == total_parameters(language) - matrix + language.hidden_size
    job = job_of(cfg, assumed)
    assert (job.completions, job.mean_tokens, job.row_tokens) == (2 * 256, 2_048, 2 * 8_192)
    plan = make_plan(arch, layout_of(cfg, 8), job, gpu, assumed)
    assert plan.worst.training["logits"] == 0
    assert model_flops(language, job) - model_flops(arch, job) == 6 * job.tokens * (matrix - language.hidden_size)
    assert not [name for name, _ in knobs(plan) if name.startswith("max_row_tokens")]  # a pair is never split
    labels = RewardModelConfig(model=cfg.model, reward_model={"loss": "pointwise"}, max_row_tokens=16_384)
    job = job_of(labels, assumed)
    assert job.completions == 256
    assert "max_row_tokens=8192" in dict(knobs(make_plan(arch, layout_of(labels, 8), job, gpu, assumed)))


def test_a_process_reward_model_is_a_reward_model_of_single_texts():
    sections = {"model": {"path": MODEL, "recompute": True}, "parallel": {"tensor": 2}}
    cfg = ProcessRewardConfig(**sections, process={"batch_size": 256})
    labels = RewardModelConfig(**sections, reward_model={"loss": "pointwise"}, max_row_tokens=cfg.row_tokens)
    language, assumed = read_architecture(MODEL), Assumed()
    assert trained_part(language, cfg) == trained_part(language, labels)
    assert job_of(cfg, assumed) == job_of(labels, assumed)
    assert "75,000 solutions" in on_ranks(1, _text_of_plan, cfg)[0]


def _text_of_plan(cfg: RewardModelConfig | ProcessRewardConfig) -> str:
    with redirect_stdout(StringIO()) as out:
        assert run_plan(cfg, 8, "h100", auto=False, assume=["mean_tokens=1000"], as_json=False, html=None)
    return out.getvalue()


def test_the_command_plans_a_reward_model_as_megatron_builds_it():
    cfg = RewardModelConfig(model={"path": MODEL, "recompute": True}, parallel={"tensor": 2, "pipeline": 2})
    text = " ".join(on_ranks(1, _text_of_plan, cfg)[0].split())
    assert text.startswith("7.50 B parameters") and "one step: 512 texts of 1,000 tokens on average, 8,192" in text
    assert "1 epoch of the paper's 66,000 pairs: " in text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": MODEL, "mtp_loss_weight": 0.1}, "model.mtp_loss_weight: found 0.1, required 0: a reward model"),
        ({"path": MODEL.parent / "Qwen2.5-Math-7B"}, r"4,096 positions, required 8,192 \(data.max_tokens\)"),
    ],
)
def test_a_plan_refuses_what_training_a_reward_model_refuses(model, message):
    with pytest.raises(ConfigError, match=message):
        run_plan(RewardModelConfig(model=model), 8, "h100", auto=False, assume=[], as_json=False, html=None)


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
