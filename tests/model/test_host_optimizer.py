"""`optimizer.offload`: Adam in host memory makes the updates of the ordinary one. With several ranks, and across a
resume with the other one: tests/parallel/test_layouts.py and test_reshard.py."""

import random
from collections.abc import Iterable

import pytest
import torch
from policies import policy_of

from r1engine.batch import PackedBatch, RowShape, Sequence, pack
from r1engine.config import RlConfig
from r1engine.model.policy import Policy
from r1engine.model.state import host_optimizer
from r1engine.model.state.offload import gradients, moved
from r1engine.stages.sft import cross_entropy

ADAM = {"eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}  # a small eps would turn rounding into whole steps


def make(world, folder, dtype: str, *, offload: bool) -> Policy:
    mtp = 0.3 if "mtp" in folder.name else 0.0
    # One parameter of all experts, in which a dtype of 2 bytes wants rows of 16 bytes.
    experts = "fused" if dtype == "float32" else "megatron"
    model = {"path": folder, "dtype": dtype, "mtp_loss_weight": mtp, "experts": experts}
    return policy_of(RlConfig(model=model, optimizer=ADAM | {"offload": offload}), world)


def rows() -> list[PackedBatch]:
    rng = random.Random(3)
    items = [Sequence([rng.randrange(2, 96) for _ in range(rng.randint(2, 40))], 1, rng.random() / 7) for _ in range(7)]
    return pack(items, RowShape(max_tokens=512))[0]


def train(policy: Policy) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Statistics of three updates, and the weights that they lead to."""
    stats = [policy.update(rows(), cross_entropy, lr).metrics for lr in (1e-2, 2e-2, 1e-2)]
    return stats, {name: tensor.clone() for name, tensor in policy.weights()}


@pytest.fixture(params=[1 << 25, 4000, 1024], ids=["one-bucket", "many-buckets", "parameters-in-pieces"])
def bucket(request, monkeypatch):
    monkeypatch.setattr(host_optimizer, "BUCKET", request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2-tied", "deepseek-mtp"])
def test_updates_are_the_ordinary_ones_to_the_last_bit(world, folders, bucket, family, dtype):
    folder = folders[family][0]
    ordinary = make(world, folder, dtype, offload=False)
    for group in ordinary.optimizer.param_groups:
        group["fused"] = True  # PyTorch's fused kernel and its loop round differently
    (expected, weights), (found, others) = train(ordinary), train(make(world, folder, dtype, offload=True))
    assert found == expected
    assert all(torch.equal(others[name], tensor) for name, tensor in weights.items())


def test_no_more_than_a_bucket_travels_at_once(world, folders, monkeypatch):
    monkeypatch.setattr(host_optimizer, "BUCKET", 1024)
    policy = make(world, folders["deepseek"][0], "float32", offload=True)
    policy.update(rows(), cross_entropy, 1e-3)
    assert max(p.numel() for p in policy.chunks[0].parameters()) == 10 * 1024
    for one in policy.optimizer.chained_optimizers:
        assert {len(room) for room in (*one.optimizer._down, *one.optimizer._up)} == {1024}


def test_updates_are_near_those_of_the_loop(world, folders):
    folder = folders["qwen2"][0]
    (expected, weights), (found, others) = (train(make(world, folder, "float32", offload=o)) for o in (False, True))
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_goes_on_with_the_other_optimizer(world, folders, tmp_path, dtype):
    """Both ways: masters and moments come over, and the next update is that of the run that was not stopped."""
    folder = folders["qwen2"][0]
    for offload in (False, True):
        whole, other = (make(world, folder, dtype, offload=o) for o in (offload, not offload))
        whole.update(rows(), cross_entropy, 1e-2)
        (checkpoint := tmp_path / str(offload)).mkdir()
        whole.save(checkpoint, None)
        other.load(checkpoint, has_snapshot=False)
        expected, found = (p.update(rows(), cross_entropy, 1e-2).metrics for p in (whole, other))
        assert found == expected  # loss and norm before the step
        for (name, tensor), (_, loaded) in zip(whole.weights(), other.weights(), strict=True):
            torch.testing.assert_close(loaded, tensor, atol=1e-6, rtol=1e-5 if dtype == "float32" else 1e-2, msg=name)


@pytest.mark.parametrize(("offload", "bytes_of_a_weight"), [(False, 14), (True, 2)])
def test_what_moves_between_phases_is_what_is_on_the_device(world, folders, offload, bytes_of_a_weight):
    policy = make(world, folders["deepseek"][0], "bfloat16", offload=offload)
    policy.update(rows(), cross_entropy, 1e-3)

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

    weights = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
    found = size(moved(policy._weights.local, policy.chunks, policy.optimizer))
    assert found == pytest.approx(bytes_of_a_weight * weights, rel=0.05)  # buffers are padded
    assert size(gradients(policy.chunks)) == pytest.approx(4 * weights, rel=0.05)


def test_too_little_host_memory_is_said_before_it_is_used(world, folders, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**8))
    with pytest.raises(RuntimeError, match=r"optimizer.offload: found .* GiB of host memory, required .* 100000000"):
        make(world, folders["qwen2"][0], "float32", offload=True)
