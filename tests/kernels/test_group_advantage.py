"""group_advantage: numbers by hand, a plain-Python oracle, and groups without a signal."""

from __future__ import annotations

import math
import random

import pytest
import torch

from r1kernels import group_advantage


def oracle(rewards: list[float], ids: list[int], mode: str, ddof: int) -> list[tuple[float, float, float, bool]]:
    """(advantage, mean, std, is_active) of each sample, eq. 3 read aloud."""
    rows = []
    for reward, own in zip(rewards, ids, strict=True):
        group = [r for r, i in zip(rewards, ids, strict=True) if i == own]
        if len(set(group)) == 1:
            rows.append((0.0, group[0], 0.0, False))
            continue
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - ddof))
        rows.append(((reward - mean) / (std if mode == "mean_std" else 1.0), mean, std, True))
    return rows


@pytest.mark.parametrize(("ddof", "wanted"), [(1, math.sqrt(3) / 2), (0, 1.0)])
def test_two_right_of_four_by_hand(ddof, wanted):
    # Mean 1/2, squared deviations add up to 1: std is sqrt(1/3) with ddof 1, 1/2 with ddof 0.
    result = group_advantage(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.zeros(4).long(), ddof=ddof)
    assert result.advantage.tolist() == pytest.approx([wanted, wanted, -wanted, -wanted], abs=1e-6)
    assert result.mean.tolist() == [0.5] * 4
    assert result.std.tolist() == pytest.approx([0.5 / wanted] * 4, abs=1e-6)
    assert result.is_active.tolist() == [True] * 4


def test_mode_mean_divides_by_nothing():
    result = group_advantage(torch.tensor([3.0, 0.0, 0.0, 1.0]), torch.zeros(4).long(), mode="mean")
    assert result.advantage.tolist() == [2.0, -1.0, -1.0, 0.0]


def test_the_default_is_the_sample_deviation():
    assert group_advantage(torch.tensor([1.0, 0.0]), torch.zeros(2).long()).advantage[0].item() == pytest.approx(
        math.sqrt(0.5)
    )


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("mode", ["mean_std", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_groups_in_any_order_match_the_oracle(seed, dtype, mode, ddof):
    draw = random.Random(seed)
    ids = [group for group in range(9) for _ in range(draw.randint(1, 7))]
    draw.shuffle(ids)
    rewards = torch.tensor([draw.choice([0.0, 0.1, 1.0, 2.0, draw.gauss(5, 3)]) for _ in ids], dtype=dtype)
    result = group_advantage(rewards, torch.tensor(ids), mode=mode, ddof=ddof)
    wanted = oracle(rewards.tolist(), ids, mode, ddof)
    for found, column in zip(result, zip(*wanted, strict=True), strict=True):
        if found.dtype == torch.bool:
            assert tuple(found.tolist()) == column
        else:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.tensor(column), rtol=1e-5, atol=1e-5)


def test_group_numbers_may_have_gaps():
    result = group_advantage(torch.tensor([1.0, 0.0, 5.0, 7.0]), torch.tensor([4, 4, 1, 1]), ddof=0)
    assert result.advantage.tolist() == [1.0, -1.0, -1.0, 1.0]
    assert result.mean.tolist() == [0.5, 0.5, 6.0, 6.0]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2, 1 / 3, 1e8 + 0.1, -2.7])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
@pytest.mark.parametrize("mode", ["mean_std", "mean"])
def test_equal_rewards_give_exactly_zero(value, size, mode):
    # The mean of 0.3 + 0.3 + 0.3 is not 0.3: dividing what is left of the rewards by its own std would give +-1.
    result = group_advantage(torch.full((size,), value, dtype=torch.float64), torch.zeros(size).long(), mode=mode)
    assert result.advantage.tolist() == [0.0] * size
    assert result.std.tolist() == [0.0] * size
    assert not result.is_active.any()


def test_a_large_common_reward_costs_no_digits():
    result = group_advantage(torch.tensor([1e8 + 1, 1e8, 1e8, 1e8 + 1], dtype=torch.float64), torch.zeros(4).long())
    assert result.advantage.tolist() == pytest.approx([math.sqrt(3) / 2, *[-math.sqrt(3) / 2] * 2, math.sqrt(3) / 2])


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_one_gives_zero(ddof):
    result = group_advantage(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1, 0, 0]), ddof=ddof)
    assert result.advantage[0].item() == 0.0
    assert (result.mean[0].item(), result.std[0].item(), result.is_active[0].item()) == (4.0, 0.0, False)


def test_no_samples():
    result = group_advantage(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert [x.shape for x in result] == [(0,)] * 4
    assert [x.dtype for x in result] == [torch.float32] * 3 + [torch.bool]


@pytest.mark.parametrize(
    ("rewards", "ids", "options", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(2).long(), {}, "rewards must be floating point, got torch.int64"),
        (
            torch.zeros(2, 2),
            torch.zeros(2, 2).long(),
            {},
            "rewards [N] and group_ids [N] int64 are required, got (2, 2) and torch.int64 (2, 2)",
        ),
        (
            torch.zeros(2),
            torch.zeros(3).long(),
            {},
            "rewards [N] and group_ids [N] int64 are required, got (2,) and torch.int64 (3,)",
        ),
        (
            torch.zeros(2),
            torch.zeros(2).int(),
            {},
            "rewards [N] and group_ids [N] int64 are required, got (2,) and torch.int32 (2,)",
        ),
        (torch.zeros(2), torch.zeros(2).long(), {"mode": "rloo"}, "mode must be 'mean_std' or 'mean', got 'rloo'"),
        (torch.zeros(2), torch.zeros(2).long(), {"ddof": 2}, "ddof must be 0 or 1, got 2"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2).long(), {}, "rewards must be finite, got nan at 1"),
        (torch.tensor([math.inf, 0.0]), torch.zeros(2).long(), {}, "rewards must be finite, got inf at 0"),
        (torch.zeros(2), torch.tensor([0, -1]), {}, "group_ids must be >= 0, got -1"),
        (
            torch.zeros(2),
            torch.zeros(2).long(),
            {"impl": "triton"},
            "impl='triton' does not exist; this op has reference",
        ),
    ],
)
def test_error(rewards, ids, options, message):
    with pytest.raises(ValueError) as caught:
        group_advantage(rewards, ids, **options)
    assert str(caught.value) == f"group_advantage: {message}"
