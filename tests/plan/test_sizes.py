"""Parameter counts against what the models' authors publish, and against Megatron's modules of every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import on_ranks

from r1engine.config import Model, Parallel, RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.hf.kv_shape import kv_bytes
from r1engine.model.stage_sizes import stage_parameters
from r1engine.plan.layout import Layout
from r1engine.plan.sizes import active_parameters, forward_work, rank_parameters, total_parameters

ROOT = Path(__file__).resolve().parents[2]
V3 = ROOT / "configs" / "models" / "DeepSeek-V3"
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
LLAMA_8B = QWEN_7B | {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def architecture(tmp_path: Path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_architecture(tmp_path)


def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active():
    arch = read_architecture(V3)
    assert total_parameters(arch) == 671_026_404_352  # of the checkpoint, without the MTP module
    assert total_parameters(arch, with_mtp=True) - total_parameters(arch) == pytest.approx(11.6e9, rel=0.01)
    assert active_parameters(arch) == pytest.approx(37.6e9, rel=0.005)
    assert forward_work(arch).total(0) == pytest.approx(2 * 37e9, rel=0.02)  # two operations a parameter


def test_dense_models_have_the_parameters_that_their_cards_say(tmp_path):
    assert total_parameters(architecture(tmp_path, QWEN_7B)) == 7_615_616_512
    assert total_parameters(architecture(tmp_path, LLAMA_8B)) == 8_030_261_248


def test_the_ranks_hold_the_model_together():
    arch = read_architecture(V3)
    layout = Layout(gpus=512, tensor=8, pipeline=16, expert=32, first_stage=4, last_stage=1)
    held = 0
    for stage in range(16):
        terms = rank_parameters(arch, layout, stage)
        copies = {"norms": 1, "router": 1, "experts": 32}
        held += sum(count * copies.get(name, 8) for name, count in terms.items())
    # What is counted 8 times and is not split: the norms of the latents, in `attention`.
    latents = 7 * 61 * (1536 + 512)
    assert held - latents == total_parameters(arch)


def stages(folder: Path, parallel: dict, gpus: int, mtp_weight: float) -> list[int]:
    cfg = RlConfig(parallel=Parallel(**parallel), model=Model(mtp_loss_weight=mtp_weight))
    return [sum(names.values()) for names in stage_parameters(read_architecture(folder), cfg.model, cfg.parallel, gpus)]


def built(folder: Path, parallel: dict, gpus: int, mtp_weight: float = 0.0) -> list[int]:
    """Parameters of each stage of the true Megatron model; in a process of its own, as it needs its own groups."""
    return on_ranks(1, stages, folder, parallel, gpus, mtp_weight)[0]


@pytest.mark.slow
def test_the_closed_forms_are_megatrons_modules_at_full_size():
    sizes = {"tensor": 8, "pipeline": 16, "context": 2, "expert": 32}
    parallel = sizes | {"first_stage_layers": 4, "last_stage_layers": 1}
    layout = Layout(gpus=512, **sizes, first_stage=4, last_stage=1)
    arch = read_architecture(V3)
    expected = [sum(rank_parameters(arch, layout, stage).values()) for stage in range(16)]
    assert built(V3, parallel, 512) == expected


@pytest.mark.slow
def test_the_closed_forms_are_megatrons_modules_of_chunks_and_with_mtp(tmp_path):
    arch = architecture(tmp_path, json.loads((V3 / "config.json").read_text()) | {"num_hidden_layers": 16})
    layout = Layout(gpus=32, tensor=8, pipeline=4, virtual=2, expert=8)
    assert layout.stage_layers(16)[1] == [2, 3, 10, 11]
    expected = [sum(rank_parameters(arch, layout, stage, with_mtp=True).values()) for stage in range(4)]
    parallel = {"tensor": 8, "pipeline": 4, "virtual": 2, "expert": 8}
    assert built(tmp_path, parallel, 32, mtp_weight=0.3) == expected


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_closed_forms_are_megatrons_modules_of_dense_models(tmp_path, tied):
    arch = architecture(tmp_path, QWEN_7B | {"tie_word_embeddings": tied})
    layout = Layout(gpus=8, tensor=4, pipeline=2)
    expected = [sum(rank_parameters(arch, layout, stage).values()) for stage in range(2)]
    assert built(tmp_path, {"tensor": 4, "pipeline": 2}, 8) == expected


def test_a_generator_keeps_the_latents_of_latent_attention_else_keys_and_values(tmp_path):
    assert kv_bytes(read_architecture(V3)) == 61 * 2 * (512 + 64)  # DeepSeek-V3's latent and the shared rotary part
    assert kv_bytes(architecture(tmp_path, QWEN_7B)) == 28 * 2 * 2 * 4 * 128
