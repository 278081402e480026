"""`model.fp8` with the real Transformer Engine on a Hopper GPU. `pytest -m gpu`."""

import pytest
import torch
from model_folders import save_model
from policies import policy_of

from r1engine.batch import Sequence, pack
from r1engine.config import RlConfig
from r1engine.model.layers.fp8 import machine_problem
from r1engine.stages.sft import cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(machine_problem() is not None, reason=f"no FP8 linears: {machine_problem()}"),
]
SIZES = {
    "qwen3": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64},
    "deepseek": {
        "hidden_size": 256, "intermediate_size": 512, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 64, "moe_intermediate_size": 128,
    },
}  # fmt: skip


@pytest.fixture(params=["qwen3", "deepseek"])
def folder(request, tmp_path):
    save_model(tmp_path, request.param, initializer_range=0.1, **SIZES[request.param])
    return tmp_path


def make(world, folder, **model):
    return policy_of(RlConfig(model={"path": folder, "experts": "fused"} | model), world)


def rows(policy):
    items = [Sequence(list(range(2, 2 + n)), 1, 0.01) for n in (5, 17, 40, 90)]
    return [row.to("cuda") for row in pack(items, policy.row_shape(256))[0]]


def test_fp8_is_near_bf16_and_is_not_bf16(world, folder):
    fp8, bf16 = make(world, folder, fp8=True), make(world, folder)
    a, b = (torch.cat(p.logprobs(rows(fp8))) for p in (fp8, bf16))
    assert 0 < (a - b).abs().mean() < 0.1
    for _ in range(3):
        found, expected = (p.update(rows(fp8), cross_entropy, 1e-3).metrics for p in (fp8, bf16))
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.03)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)


def test_the_reference_is_computed_with_its_own_weights(world, folder):
    policy = make(world, folder, fp8=True)
    batch, snapshot = rows(policy), policy.snapshot()
    start = policy.logprobs(batch)[0]
    policy.update(batch, cross_entropy, 1e-2)
    moved = policy.logprobs(batch)[0]
    assert torch.equal(policy.reference_logprobs(snapshot, batch)[0], start)
    assert torch.equal(policy.logprobs(batch)[0], moved) and not torch.equal(moved, start)


@pytest.mark.parametrize("recompute", [True, "selective"])
def test_recomputation_gives_the_same_gradients(world, folder, recompute):
    norms = [make(world, folder, fp8=True, recompute=r) for r in (False, recompute)]
    norms = [policy.update(rows(policy), cross_entropy, 1e-3).metrics["grad_norm"] for policy in norms]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_checkpoint_goes_on_bit_for_bit(world, folder, tmp_path):
    whole, resumed = (make(world, folder, fp8=True) for _ in range(2))
    whole.update(rows(whole), cross_entropy, 1e-3)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    whole.save(checkpoint, None)
    resumed.load(checkpoint, has_snapshot=False)
    assert (
        whole.update(rows(whole), cross_entropy, 1e-3).metrics
        == resumed.update(rows(resumed), cross_entropy, 1e-3).metrics
    )
