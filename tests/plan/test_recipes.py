"""Recipes of others that run, most with a published time of a step, against the plan; docs/plan.md has the table."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from r1engine.hf.architecture import Architecture, read_architecture
from r1engine.plan.hardware import GPUS, Assumed
from r1engine.plan.layout import Layout
from r1engine.plan.memory import Job
from r1engine.plan.planner import Plan, make_plan
from r1engine.plan.sizes import total_parameters

ROOT = Path(__file__).resolve().parents[2]
QWEN3 = {  # the sizes that Hugging Face's configurations have
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}
SIZES = {  # hidden, layers, heads, key/value heads, intermediate, of an expert
    "Qwen3-32B": (5120, 64, 64, 8, 25_600, None),
    "Qwen3-30B-A3B": (2048, 48, 32, 4, 6144, 768),
    "Qwen3-235B-A22B": (4096, 94, 64, 4, 12_288, 1536),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an author publishes of a run; `layout` is of the trainer, whose GPUs the generators share unless `own`."""

    model: str
    layout: Layout
    seconds: float | None  # of a step; None: not published
    sequences: int
    minibatches: int = 1
    tokens: float  # mean of prompt and completion
    prompt: float = 100
    longest: int
    row: int | None = None  # None: one longest sequence
    generator: int
    generator_bytes: int = 2
    own: int = 0  # GPUs of generators that work one step ahead
    gpu: str = "h100"


# NeMo-RL, docs/about/performance-summary.md of its releases 0.4 and 0.6: sequences of so many tokens on average, the
# greatest length, GPUs, sequences of a step and of an update, layouts. That half of the GPUs of its runs one step ahead
# generate follows from the training layouts. verl: docs/perf/dpsk.md; slime: docs/en/examples/deepseek-r1.md.
V3 = Layout(gpus=256, pipeline=16, expert=16, first_stage=3, last_stage=2)
V3_RECIPE = Recipe(model="DeepSeek-V3", layout=V3, seconds=134, sequences=512, tokens=701, longest=1536, generator=32)
LLAMA = Recipe(
    model="Llama-3.1-8B", layout=Layout(gpus=16, pipeline=2, recompute="none"), seconds=97.7, sequences=2048,
    minibatches=4, tokens=1060, longest=4096, generator=1,
)  # fmt: skip
Q235 = Recipe(
    model="Qwen3-235B-A22B", seconds=506, sequences=512, tokens=5671, longest=8192, generator=16,
    layout=Layout(gpus=128, tensor=2, context=2, expert=16, pipeline=8, first_stage=11, last_stage=11),
)  # fmt: skip
Q30 = Recipe(
    model="Qwen3-30B-A3B", layout=Layout(gpus=32, tensor=2, expert=8, recompute="none"), seconds=225, sequences=2048,
    minibatches=4, tokens=3154, longest=4096, generator=4,
)  # fmt: skip
Q32 = Recipe(
    model="Qwen3-32B", layout=Layout(gpus=32, tensor=4, pipeline=4, recompute="none"), seconds=393, sequences=2048,
    minibatches=4, tokens=3206, longest=4096, generator=4,
)  # fmt: skip
RECIPES = {
    "NeMo-RL 0.4": LLAMA,
    "NeMo-RL 0.4, one step ahead": replace(
        LLAMA, layout=replace(LLAMA.layout, gpus=8), own=8, tokens=1129, seconds=74.6
    ),
    "NeMo-RL 0.4 30B": Q30,
    "NeMo-RL 0.4 30B, one step ahead": replace(
        Q30, layout=Layout(gpus=16, expert=8, pipeline=2), own=16, generator=2, tokens=3158, seconds=244
    ),
    "NeMo-RL 0.4 32B": Q32,
    "NeMo-RL 0.4 32B, one step ahead": replace(Q32, own=32, tokens=3207, seconds=215),
    "NeMo-RL 0.4 235B": Q235,
    "NeMo-RL 0.4 235B, one step ahead": replace(
        Q235, layout=replace(Q235.layout, tensor=4, context=1), own=128, generator=8, tokens=5691, seconds=241
    ),
    "NeMo-RL 0.4 V3": replace(V3_RECIPE, tokens=745, seconds=154),
    "NeMo-RL 0.4 V3, one step ahead": replace(V3_RECIPE, tokens=744, own=256, seconds=77.9),
    "NeMo-RL 0.6 V3": V3_RECIPE,
    "NeMo-RL 0.6 V3 on 512": replace(V3_RECIPE, layout=replace(V3, gpus=512), seconds=111),
    "NeMo-RL 0.6 V3, one step ahead": replace(V3_RECIPE, own=256, seconds=64.1),
    "verl V3": Recipe(
        model="DeepSeek-V3", seconds=1700, sequences=768, tokens=2160, prompt=200, longest=8192, row=10_240,
        generator=32, gpu="h20",
        layout=Layout(gpus=96, tensor=8, pipeline=12, expert=8, first_stage=4, last_stage=7, optimizer_offload=True),
    ),
    "slime V3": Recipe(
        model="DeepSeek-V3", seconds=None, sequences=1024, tokens=8200, prompt=200, longest=32_768, row=65_536,
        generator=64, generator_bytes=1,
        layout=Layout(gpus=128, tensor=8, pipeline=4, expert=32, context=4, last_stage=13, optimizer_offload=True),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Architecture]:
    found = {name: read_architecture(ROOT / "configs" / "models" / name) for name in ("DeepSeek-V3", "Llama-3.1-8B")}
    for name, (hidden, layers, heads, kv_heads, intermediate, expert) in SIZES.items():
        sizes = {
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
            "model_type": "qwen3_moe" if expert else "qwen3",
            "architectures": ["Qwen3MoeForCausalLM" if expert else "Qwen3ForCausalLM"],
        }  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        more = EXPERTS | {"moe_intermediate_size": expert, "mlp_only_layers": []} if expert else {}
        (folder / "config.json").write_text(json.dumps(QWEN3 | sizes | more))
        found[name] = read_architecture(folder)
    return found


def plan_of(recipe: Recipe, models: dict[str, Architecture]) -> Plan:
    job = Job(
        questions=recipe.sequences // 16,
        group_size=16,
        minibatches=recipe.minibatches,
        inner_epochs=1,
        prompt_tokens=recipe.prompt,
        mean_tokens=recipe.tokens - recipe.prompt,
        max_tokens=recipe.longest,
        row_tokens=recipe.row or recipe.longest,
        has_reference=True,
        logits_chunk=1024 if recipe.row else None,
        generator_tensor=recipe.generator,
        generator_bytes=recipe.generator_bytes,
        generators=recipe.own // recipe.generator or None,
        is_ahead=recipe.own > 0,
    )
    return make_plan(models[recipe.model], recipe.layout, job, GPUS[recipe.gpu], Assumed(refresh_cards=8))


def test_the_models_have_their_published_sizes(models):
    published = {"Qwen3-32B": 32.8, "Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235.1}
    assert {name: round(total_parameters(models[name]) / 1e9, 1) for name in published} == published


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_fit(models, name):
    assert plan_of(RECIPES[name], models).limits() == []


def test_planned_times_are_near_the_published_ones(models):
    """Within a factor of two, but for verl's; and as often too high as too low, so that a plan is no bound."""
    ratios = {n: r.seconds / plan_of(r, models).seconds for n, r in RECIPES.items() if r.seconds is not None}
    assert ratios.pop("verl V3") < 3.5
    assert all(0.5 < ratio < 2.1 for ratio in ratios.values()), ratios
    assert 0.9 < math.exp(sum(map(math.log, ratios.values())) / len(ratios)) < 1.3


def test_the_table_of_the_docs_has_these_recipes(models):
    text = (ROOT / "docs" / "plan.md").read_text().splitlines()
    for recipe in RECIPES.values():
        plan = plan_of(recipe, models)
        gpus = f"{recipe.layout.gpus} {recipe.gpu.upper()}" + (f" + {recipe.own}" if recipe.own else "")
        published = "not published" if recipe.seconds is None else f"{recipe.seconds:,.5g} s"
        error = "" if recipe.seconds is None else f"{plan.seconds / recipe.seconds - 1:+.0%}"
        cells = [
            recipe.model,
            plan.layout.describe(),
            gpus,
            f"{plan.seconds:,.0f} s",
            published,
            *([error] if error else []),
        ]
        assert any(" | ".join(cells) in line for line in text), cells
