"""`model.fp8`: Transformer Engine's linears under Megatron's wrappers, with a fake of the package (fake_te/) that
computes block-scaled FP8 in PyTorch. The real one needs a GPU: tests/gpu/test_fp8_linears_gpu.py."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from model_folders import save_model
from policies import policy_of
from safetensors.torch import load_file

from r1engine.config import ConfigError, RewardModelConfig, RlConfig, SftConfig
from r1engine.hf.architecture import read_architecture
from r1engine.hf.layout import fp8_problem
from r1engine.model.layers import fp8
from r1engine.run import train

HERE = Path(__file__).parent
WORKER = HERE / "fp8_linears_worker.py"
FAMILIES = ("qwen2", "deepseek")
# Blocks of 128 stay whole when two ranks share a matrix.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.1}
LATENT = {
    "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    "moe_intermediate_size": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    save_model(folder / "qwen2", "qwen2", **WIDE)
    save_model(folder / "deepseek", "deepseek", **WIDE, **LATENT)
    return folder


@pytest.fixture(scope="module")
def out(models, tmp_path_factory):
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def results(models, out):
    """{ranks: what they found}, of one rank and of two tensor-parallel ones."""
    path = os.pathsep.join([str(HERE / "fake_te"), str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, WORKER, models, out], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {ranks: torch.load(out / f"{ranks}.pt") for ranks in (1, 2)}


@pytest.fixture
def one(results):
    return results[1]


@pytest.fixture
def two(results):
    return results[2]


def differences(found: dict[str, list[float]], expected: dict[str, list[float]]) -> list[float]:
    """Of two sets of log-probabilities by sequence."""
    assert found.keys() == expected.keys()
    return [abs(a - b) for key in found for a, b in zip(found[key], expected[key], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_names_and_bytes_that_they_have_without_fp8(one, models, out, family):
    assert one[family]["names"] == one[f"{family}-local"]["names"]
    before, after = (load_file(f / "model.safetensors") for f in (models / family, out / f"{family}-1"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_they_are_megatrons_linears(one, family):
    assert max(differences(one[family]["unquantized"], one[f"{family}-local"]["logp"])) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_changes_the_result_a_little(one, family):
    """E4M3 keeps 3 bits behind the leading one: some percent of a matrix product, a fraction of a nat here."""
    local = one[f"{family}-local"]
    assert 0.01 < mean(differences(one[family]["logp"], local["logp"])) < 0.3
    for found, expected in zip(one[family]["stats"], local["stats"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
        assert found["loss"] != expected["loss"]


def test_the_linears_in_fp8_are_those_of_the_docstring(one):
    attention = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    mlp = ["mlp.linear_fc1", "mlp.linear_fc2"]
    assert one["qwen2"]["in fp8"] == sorted(f"decoder.layers.{i}.{x}" for i in range(2) for x in attention + mlp)
    latent = ["linear_kv_up_proj", "linear_proj", "linear_q_down_proj", "linear_q_up_proj"]  # not linear_kv_down_proj
    expected = [f"decoder.layers.{i}.self_attention.{x}" for i in range(2) for x in latent]
    expected += [f"decoder.layers.0.{x}" for x in mlp]
    expected += [f"decoder.layers.1.mlp.shared_experts.{x}" for x in ("linear_fc1", "linear_fc2")]
    assert one["deepseek"]["in fp8"] == sorted(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_is_in_fp8_too(one, family):
    """Its first pass, without gradient, takes another RMSNorm on the CPU, which may move a value to the next number."""
    none, full, selective = (one[f"{family}-recomputed"][key] for key in ("False", "True", "selective"))
    assert (none["checkpoints"], selective["checkpoints"]) == (0, 0) and full["checkpoints"] > 0
    for other in (full, selective):
        assert other["stats"] == pytest.approx(none["stats"], rel=1e-3)  # without FP8 it is another per cent


def test_quantized_copies_follow_the_weights_and_do_not_outlive_a_pass(one):
    """Updated weights, and the weights of a snapshot that are lent for one pass."""
    found = one["renewed"]
    assert not torch.equal(found["moved"], found["start"])
    assert torch.equal(found["reference"], found["start"])
    assert torch.equal(found["again"], found["moved"])
    assert found["copies"] == 0


@pytest.mark.parametrize("written", ["fp8", "plain"])
@pytest.mark.parametrize("read", ["fp8", "plain"])
def test_a_checkpoint_does_not_depend_on_fp8(one, written, read):
    found = one["resumed"][written]
    assert found["states"] == []
    assert all(torch.equal(found[read]["loaded"][name], tensor) for name, tensor in found["saved"].items())
    if written == read:
        assert found[read]["next"] == found["next"]
    else:
        assert found[read]["next"]["loss"] == pytest.approx(found["next"]["loss"], rel=0.02)


MULTIPLES = {"qwen2": 256, "deepseek": 256, "qwen2-whole-rows": 128, "deepseek-context": 512}


@pytest.mark.parametrize("name", MULTIPLES)
def test_two_ranks_equal_one(one, two, out, name):
    family = name.split("-")[0]
    found, expected = two[name], one[family]
    assert found["multiple"] == MULTIPLES[name] and expected["multiple"] == 128
    assert max(differences(found["unquantized"], expected["unquantized"])) < 1e-5
    # Sums over ranks round differently, which moves a few values to the next number of E4M3.
    assert mean(differences(found["logp"], expected["logp"])) < 4e-3
    assert found["stats"][0] == pytest.approx(expected["stats"][0], rel=3e-3)  # later a token may change its experts
    exported = name if "-" in name else f"{name}-2"
    files = [folder / "model.safetensors" for folder in (out / exported, out / f"{family}-1")]
    assert files[0].read_bytes() == files[1].read_bytes()


# ------------------------------------------------------------------ what cannot run


def test_the_machine_is_asked(one):
    found, lacking = one["problem"]
    assert found is None
    assert lacking == "transformer_engine 2.11.0 cannot scale by blocks on this machine: " + (
        "compute capability 9.0 is required"
    )


@pytest.mark.skipif(fp8.machine_problem() is None, reason="Transformer Engine can run here")
def test_without_transformer_engine_the_error_says_what_to_install(world, models, tmp_path):
    message = r"model\.fp8: found no transformer_engine, required pip install .*'transformer-engine\[pytorch\]"
    with pytest.raises(ConfigError, match=message):
        policy_of(RlConfig(model={"path": models / "qwen2", "fp8": True}), world)
    for kind in (RlConfig, SftConfig, RewardModelConfig):  # before servers start, or data is read
        with pytest.raises(ConfigError, match=message):
            train(kind(run_dir=tmp_path / "run", model={"path": models / "qwen2", "fp8": True}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "changes", "tensor", "experts", "message"),
    [
        ("qwen2", {}, 32, "fused", "the intermediate size is 8 on each of 32 tensor-parallel ranks"),
        ("qwen2", {"hidden_size": 200}, 1, "fused", "the hidden size is 200 on the only tensor-parallel rank"),
        ("deepseek", LATENT | {"q_lora_rank": 24}, 1, "fused", "q_lora_rank is 24 on the only"),
        ("qwen2", {"hidden_size": 320}, 2, "fused", "the hidden size is 320, required a multiple of 128 with sequence"),
        ("deepseek", LATENT | {"kv_lora_rank": 64}, 2, "fused", "the kv_lora_rank is 64, required a multiple of 128"),
        ("deepseek", LATENT, 1, "megatron", "model.experts: found megatron with model.fp8, required fused or"),
    ],
)
def test_matrices_that_fp8_cannot_take_are_named(tmp_path, family, changes, tensor, experts, message):
    save_model(tmp_path, family, **(WIDE | changes))
    problem = fp8_problem(read_architecture(tmp_path), tensor, experts, is_sequence_parallel=True)
    assert problem is not None and problem.startswith((f"model.fp8: {message}", message))
