"""The same policy on a GPU: bfloat16 against transformers, and offloading that really frees memory. `pytest -m gpu`."""

import itertools

import pytest
import torch
from policies import policy_of

from r1engine.batch import RowShape, Sequence, pack
from r1engine.config import RlConfig
from r1engine.stages.sft import cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def policy(world, folders):
    return policy_of(RlConfig(model={"path": folders["qwen3"][0]}), world)


def rows(world):
    items = [Sequence(list(range(2, 2 + n)), 1, 0.01) for n in (5, 17, 40)]
    return [row.to(world.device) for row in pack(items, RowShape(max_tokens=64))[0]]


def test_bf16_logprobs_are_within_twice_the_error_of_transformers_bf16(world, folders, policy):
    model = folders["qwen3"][1]
    for row, logp in zip(rows(world), policy.logprobs(rows(world)), strict=True):
        ends = row.cu_seqlens.tolist()
        for a, b in itertools.pairwise(ends):
            x = row.tokens[a:b].cpu()[None]
            exact, rounded = (
                torch.log_softmax(m(x.to(d)).logits[0].float().cpu(), -1)[:-1].gather(1, x[0, 1:, None])[:, 0]
                for m, d in ((model, "cpu"), (model.to(world.device, torch.bfloat16), world.device))
            )
            model.to("cpu", torch.float32)
            allowed = 2 * (rounded - exact).abs().max() + 1e-3
            assert (logp[a + 1 : b].cpu() - exact).abs().max() <= allowed


def test_update_lowers_the_loss(world, policy):
    losses = [policy.update(rows(world), cross_entropy, 1e-3).metrics["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]


def test_asleep_the_training_state_is_not_in_device_memory(world, policy):
    with policy.awake():
        policy.update(rows(world), cross_entropy, 1e-3)
        before = policy.logprobs(rows(world))[0]
        awake = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() < awake
    with policy.awake():
        assert torch.equal(policy.logprobs(rows(world))[0], before)


def test_an_optimizer_on_the_host_makes_the_same_updates_in_less_device_memory(world, folders):
    # Not bit for bit: the ordinary one is Transformer Engine's or PyTorch's kernel for GPUs.
    found = {}
    for offload in (False, True):
        before = torch.cuda.memory_allocated()
        optimizer = {"offload": offload, "eps": 1e-3}
        policy = policy_of(RlConfig(model={"path": folders["deepseek"][0]}, optimizer=optimizer), world)
        with policy.awake():
            stats = [policy.update(rows(world), cross_entropy, 1e-2).metrics for _ in range(3)]
            used = torch.cuda.memory_allocated() - before
        with policy.awake():  # what slept comes back, what was on the host stayed
            stats.append(policy.update(rows(world), cross_entropy, 1e-2).metrics)
        found[offload] = stats, used
        del policy
    for ordinary, on_host in zip(found[False][0], found[True][0], strict=True):
        assert on_host["loss"] == pytest.approx(ordinary["loss"], rel=1e-2)
        assert on_host["grad_norm"] == pytest.approx(ordinary["grad_norm"], rel=5e-2)
    assert found[True][1] < 0.6 * found[False][1]


def test_a_policy_read_from_a_checkpoint_goes_on_bit_for_bit(world, folders, tmp_path):
    whole, resumed = (policy_of(RlConfig(model={"path": folders["deepseek"][0]}), world) for _ in range(2))
    for _ in range(2):
        whole.update(rows(world), cross_entropy, 1e-3)
    whole.save(tmp_path, None)
    resumed.load(tmp_path, has_snapshot=False)  # bfloat16 weights, float32 master weights and moments
    for _ in range(2):
        assert (
            whole.update(rows(world), cross_entropy, 1e-3).metrics
            == resumed.update(rows(world), cross_entropy, 1e-3).metrics
        )
    for (name, expected), (_, found) in zip(whole.weights(), resumed.weights(), strict=True):
        assert torch.equal(expected, found), name


def test_mtp_modules_learn_without_moving_the_policy(world, folders):
    config = {"path": folders["deepseek-mtp"][0]}
    plain, with_mtp = (policy_of(RlConfig(model=config | {"mtp_loss_weight": w}), world) for w in (0.0, 0.3))
    stats = [with_mtp.update(rows(world), cross_entropy, 1e-3).metrics for _ in range(3)]
    for _ in range(3):
        plain.update(rows(world), cross_entropy, 1e-3)
    assert stats[-1]["mtp_loss"] < stats[0]["mtp_loss"]
    for (name, expected), (_, found) in zip(plain.weights(), with_mtp.weights(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
