"""The configurations in configs/: they load, and on paper they fit the GPUs that they are written for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import DeepseekV3Config

from r1engine.config import RewardModelConfig, SftConfig, load
from r1engine.hf.architecture import architecture_of, read_architecture
from r1engine.plan.cost import parts_of
from r1engine.plan.hardware import GPUS, Assumed
from r1engine.plan.planner import Plan, make_plan
from r1engine.plan.request import check_generators, job_of, layout_of, trained_part
from r1engine.plan.search import search
from r1engine.plan.sizes import total_parameters

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "r1_zero_671b": ("h800", 512),
    "r1_zero_671b_256": ("h800", 256),
    "r1_zero_671b_128": ("h200", 128),
    "gsm8k_qwen2.5_0.5b": ("h100", 1),
    "bases/qwen2.5_math_1.5b": ("h100", 8),
    "bases/qwen2.5_math_7b": ("h100", 8),
    "bases/llama_3.1_8b": ("h100", 8),
    "bases/qwen2.5_14b": ("h100", 16),
    "bases/qwen2.5_32b": ("h100", 32),
    "bases/llama_3.3_70b": ("h100", 64),
    "zero_qwen_32b": ("h100", 64),
    "distill/qwen2.5_math_1.5b": ("h100", 8),
    "distill/qwen2.5_math_7b": ("h100", 8),
    "distill/llama_3.1_8b": ("h100", 8),
    "distill/qwen2.5_14b": ("h100", 16),
    "distill/qwen2.5_32b": ("h100", 32),
    "distill/llama_3.3_70b": ("h100", 64),
    "reward_models/llama_3.1_8b": ("h100", 8),
    "reward_models/helpfulness_671b": ("h800", 256),
    "reward_models/safety_671b": ("h800", 256),
}
RATES = {  # v2, Table 6
    "Qwen2.5-Math-1.5B": 1e-4,
    "Qwen2.5-Math-7B": 8e-5,
    "Qwen2.5-14B": 7e-5,
    "Qwen2.5-32B": 6e-5,
    "Llama-3.1-8B": 5e-5,
    "Llama-3.3-70B-Instruct": 2e-5,
}
PUBLISHED = {  # parameters of the checkpoints
    "DeepSeek-V3": 671_026_404_352,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
}


def test_every_configuration_of_a_real_model_is_here():
    found = {str(f.relative_to(ROOT / "configs").with_suffix("")) for f in (ROOT / "configs").rglob("*.yaml")}
    assert found - CONFIGS.keys() == {
        "r1_zero",
        "tiny_r1_zero",
        "demo",
        "demo_moe",
        "eval_tiny",
        "laptop_smollm2",
        "eval_r1",
        "r1",
        "tiny_r1",
        "tiny_search",
    }
    assert {folder.name for folder in (ROOT / "configs" / "models").iterdir()} == PUBLISHED.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_fits_its_gpus(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    (gpu, gpus), cfg, assumed = CONFIGS[name], load(ROOT / "configs" / f"{name}.yaml", []), Assumed()
    arch = trained_part(architecture_of(cfg.model), cfg)
    check_generators(cfg, gpus, GPUS[gpu])
    plan = make_plan(arch, layout_of(cfg, gpus), job_of(cfg, assumed), GPUS[gpu], assumed)
    assert [limit for part in parts_of(cfg, plan) for limit in part.plan.limits()] == []
    longest = cfg.longest_sequence
    assert longest <= arch.max_positions


def planned(name: str) -> Plan:
    (gpu, gpus), cfg, assumed = CONFIGS[name], load(ROOT / "configs" / f"{name}.yaml", []), Assumed()
    arch = trained_part(architecture_of(cfg.model), cfg)
    return make_plan(arch, layout_of(cfg, gpus), job_of(cfg, assumed), GPUS[gpu], assumed)


@pytest.mark.parametrize(
    "name", [n if "671b" not in n else pytest.param(n, marks=pytest.mark.rotating) for n in CONFIGS]
)
def test_a_configuration_is_what_the_search_finds(monkeypatch, name):
    """But for the numbers that the search leaves (servers of 16 GPUs, a row for 24 GiB), which cost some."""
    monkeypatch.chdir(ROOT)
    plan = planned(name)
    best = search(plan.arch, plan.job, plan.layout.gpus, plan.gpu, plan.assumed)[0]
    allowed = {"gsm8k_qwen2.5_0.5b": 2.2}.get(name, 1.2 if "671b" in name else 1.05)
    assert plan.seconds <= allowed * best.seconds


def test_the_table_of_the_docs_is_what_the_plans_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, found = (ROOT / "docs" / "plan.md").read_text(), []
    for name in CONFIGS:
        plan = planned(name)
        gpus = f"{plan.layout.gpus} {plan.gpu.name.upper()}"
        gpus += f" + {plan.job.generator_gpus}" if plan.job.generators else ""
        update = max(sum(stage.training.values()) for stage in plan.stages)
        seconds = f"{plan.seconds:,.0f} s" if plan.job.generates else f"{plan.seconds:.1f} s"
        start, end = f"| `{name}` | {gpus} | {plan.layout.describe()} | ", f" | {seconds} | {update:.0f} GiB |"
        found.append(any(line.startswith(start) and line.endswith(end) for line in text.splitlines()))
    assert dict(zip(CONFIGS, found, strict=True)) == dict.fromkeys(CONFIGS, True)


def test_distillation_has_the_papers_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {}
    for file in (ROOT / "configs" / "distill").glob("*.yaml"):
        cfg = load(file, [])
        assert isinstance(cfg, SftConfig)
        assert (cfg.sft.batch_size, cfg.sft.epochs, cfg.data.max_tokens) == (64, 2, 32_768)
        assert (cfg.optimizer.schedule, cfg.optimizer.min_lr_ratio) == ("cosine", 0.1)
        assert architecture_of(cfg.model).max_positions == 131_072
        found[cfg.model.folder.name] = cfg.optimizer.lr
    assert found == RATES


def test_reward_models_have_the_papers_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    losses = {}
    for file in (ROOT / "configs" / "reward_models").glob("*.yaml"):
        cfg = load(file, [])
        assert isinstance(cfg, RewardModelConfig)
        assert (cfg.reward_model.batch_size, cfg.reward_model.epochs, cfg.data.max_tokens) == (256, 1, 8_192)
        assert (cfg.optimizer.lr, cfg.optimizer.schedule) == (6e-6, "constant")
        losses[file.stem] = cfg.reward_model.loss, cfg.sees
    pairs, labels = ("pairwise", "summary"), ("pointwise", "response")
    assert losses == {"helpfulness_671b": pairs, "safety_671b": labels, "llama_3.1_8b": pairs}


def test_table_6s_run_has_the_papers_numbers(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load(ROOT / "configs" / "zero_qwen_32b.yaml", [])
    grpo, rollout = cfg.grpo, cfg.rollout
    assert (cfg.optimizer.lr, grpo.kl_coef, rollout.temperature, rollout.max_tokens) == (2e-6, 0.001, 1.0, 32_768)
    assert (grpo.group_size, grpo.questions * grpo.group_size, grpo.minibatches) == (16, 8_192, 16)
    assert cfg.steps == 10_000 and grpo.reference_every == 400


def test_the_first_run_on_one_gpu_takes_less_than_an_hour_and_24_gib_to_update(monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg, assumed = load(ROOT / "configs" / "gsm8k_qwen2.5_0.5b.yaml", []), Assumed(mean_tokens=300)
    plan = make_plan(read_architecture(cfg.model.path), layout_of(cfg, 1), job_of(cfg, assumed), GPUS["h100"], assumed)
    assert plan.fits and plan.seconds * cfg.steps / cfg.steps_per_rollout < 3600
    assert sum(plan.stages[0].training.values()) < 24


def test_671b_trains_on_128_gpus_of_80_gb_with_the_optimizer_on_the_host(monkeypatch):
    monkeypatch.chdir(ROOT)
    assumed, gpu = Assumed(), GPUS["h100"]
    plans = []
    for offload in ("false", "true"):
        cfg = load(ROOT / "configs" / "r1_zero_671b_128.yaml", [f"optimizer.offload={offload}"])
        arch = read_architecture(cfg.model.path)
        job = job_of(cfg, replace(assumed, generator_gpus=32))
        plans.append(make_plan(arch, layout_of(cfg, 128), job, gpu, assumed))
    on_device, on_host = plans
    assert not on_device.fits and on_host.limits() == []
    assert on_host.seconds < 1.1 * on_device.seconds


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name):
    assert total_parameters(read_architecture(ROOT / "configs" / "models" / name)) == PUBLISHED[name]


def test_deepseek_v3_is_what_transformers_takes_it_for():
    given = json.loads((ROOT / "configs/models/DeepSeek-V3/config.json").read_text())
    defaults = DeepseekV3Config()  # those of the 671B model, but for its context
    known = [key for key in given if hasattr(defaults, key) and key not in ("architectures", "rope_scaling")]
    assert len(known) > 25
    different = {key for key in known if given[key] != getattr(defaults, key)}
    assert different == {"max_position_embeddings"}
