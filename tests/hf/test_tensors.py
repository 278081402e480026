"""The table of names and shapes: what transformers and DeepSeek write, and what every reader of it makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from model_folders import FAMILIES, save_model
from safetensors.torch import load_file

from r1engine.hf.architecture import read_architecture
from r1engine.hf.formats import stored
from r1engine.hf.tensors import Shapes, hf_shapes, is_float32, mtp_copies, mtp_shapes
from r1engine.model.state.rules import mtp_rules, rules
from r1engine.plan.sizes import total_parameters
from r1engine.rollout.local.weights import Weights
from r1engine.rollout.sglang.checksum import Expected, parts

ROOT = Path(__file__).resolve().parents[2]
V3 = read_architecture(ROOT / "configs" / "models" / "DeepSeek-V3")
OUTPUT_BIAS = ["llama", "qwen3", "qwen3-moe"]  # families that have one with attention_bias
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def arch(folders, family):
    return read_architecture(folders[family][0])


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def saved(folder: Path) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


# ------------------------------------------------------------------ the table against those who define it


@every_family
def test_names_and_shapes_are_those_that_transformers_writes(folders, family):
    folder = folders[family][0]
    arch, found = read_architecture(folder), saved(folder)
    if arch.is_tied:
        found.pop("lm_head.weight", None)
    assert {name: shape for name, shape in found.items() if name not in mtp_shapes(arch)} == hf_shapes(arch)


@pytest.mark.parametrize("family", OUTPUT_BIAS)
def test_attention_bias_is_in_the_table(tmp_path, family):
    save_model(tmp_path, family, attention_bias=True)
    shapes = hf_shapes(read_architecture(tmp_path))
    assert shapes == saved(tmp_path)
    assert shapes["model.layers.3.self_attn.o_proj.bias"] == (32,)


def test_the_table_has_every_number_of_deepseek_v3s_checkpoint():
    # Numbers by type as the Hugging Face Hub lists them for deepseek-ai/DeepSeek-V3, MTP module and scales included.
    found: Counter[torch.dtype] = Counter()
    for name, shape in (hf_shapes(V3) | mtp_shapes(V3)).items():
        for form in stored(name, shape, "fp8").values():
            found[form.dtype] += math.prod(form.shape)
    assert found[torch.float8_e4m3fn] == 680_571_043_840
    assert found[torch.bfloat16] == 3_918_786_560
    assert found[torch.float32] == 41_555_600


def test_an_mtp_module_is_a_layer_and_what_joins_it():
    layer = {
        name.replace("layers.60", "layers.61"): shape for name, shape in hf_shapes(V3).items() if ".layers.60." in name
    }
    assert mtp_shapes(V3).items() >= layer.items()
    assert {name: shape for name, shape in mtp_shapes(V3).items() if name not in layer} == {
        "model.layers.61.embed_tokens.weight": (129280, 7168),
        "model.layers.61.enorm.weight": (7168,),
        "model.layers.61.hnorm.weight": (7168,),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.shared_head.norm.weight": (7168,),
        "model.layers.61.shared_head.head.weight": (129280, 7168),
    }


@every_family
def test_only_the_experts_bias_stays_in_float32(arch):
    kept = [name for name in hf_shapes(arch) if is_float32(name)]
    layers = [layer for layer in range(arch.num_layers) if arch.has_experts(layer)]
    layers = layers if arch.moe and arch.moe.has_bias else []
    assert kept == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in layers]


# ------------------------------------------------------------------ its readers


@every_family
def test_the_trainers_rules_take_every_tensor_once_in_order(arch):
    assert [hf for rule in rules(arch).values() for hf in rule.hf] == list(hf_shapes(arch))
    copies = [name for names in mtp_copies(arch).values() for name in names]
    taken = [hf for rule in mtp_rules(arch).values() for hf in rule.hf]
    assert sorted(taken + copies) == sorted(mtp_shapes(arch))


def test_a_tensor_that_no_rule_takes_is_named(folders):
    arch = dataclasses.replace(read_architecture(folders["llama"][0]), has_output_bias=True)
    with pytest.raises(ValueError, match=r"rules: no Megatron parameter takes self_attn\.o_proj\.bias of layer 0"):
        rules(arch)


@every_family
def test_a_rule_splits_what_it_joins(arch):
    shapes = hf_shapes(arch)
    for name, rule in rules(arch).items():
        tensors = [torch.randn(shapes[hf]) for hf in rule.hf]
        joined = rule.fuse(tensors)
        assert joined.numel() == sum(tensor.numel() for tensor in tensors), name
        assert all(torch.equal(a, b) for a, b in zip(rule.unfuse(joined), tensors, strict=True)), name


@every_family
def test_the_generator_takes_the_tensors_of_the_table_and_no_other(arch):
    weights = Weights(arch, device=torch.device("cpu"), dtype=torch.float32)
    weights.load((name, torch.ones(shape)) for name, shape in hf_shapes(arch).items())
    assert weights.is_complete
    with pytest.raises(ValueError) as error:
        weights.load([("model.norm.bias", torch.ones(1))])
    missing = [f"{name} is missing" for name in hf_shapes(arch)]
    assert sorted(str(error.value).removeprefix("load_weights: ").split("; ")) == sorted(
        ["model.norm.bias is unknown", *missing]
    )


@every_family
def test_the_checksum_has_a_place_for_every_tensor_and_no_gap(arch):
    places: dict[str, list[int]] = {}
    for name in hf_shapes(arch):
        part = parts(arch)[name]
        places.setdefault(part.whole, []).append(part.place)
        assert part.num_parts > part.place
    assert all(sorted(found) == list(range(len(found))) for found in places.values())
    collector = Expected(arch, 2)
    for name, shape in hf_shapes(arch).items():
        collector.add(name, torch.ones(shape))
    assert collector.digests[0].keys() == collector.digests[1].keys() == places.keys()
    assert collector.compare(collector.digests) == []


@pytest.mark.parametrize("family", [*FAMILIES, "DeepSeek-V3"])
def test_the_planner_counts_the_elements_of_the_table(folders, family):
    arch = V3 if family == "DeepSeek-V3" else read_architecture(folders[family][0])
    main, mtp = (
        {n: s for n, s in shapes.items() if not is_float32(n)} for shapes in (hf_shapes(arch), mtp_shapes(arch))
    )
    copies = {copy for names in mtp_copies(arch).values() for copy in names}
    own = {name: shape for name, shape in mtp.items() if name not in copies}
    assert total_parameters(arch) == elements(main)  # the experts' biases are buffers
    assert total_parameters(arch, with_mtp=True) == elements(main) + elements(own)
