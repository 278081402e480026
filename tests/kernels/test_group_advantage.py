"""group_advantage: numbers by hand, a plain-Python oracle, groups without a signal, and what a GPU would run."""

from __future__ import annotations

import math
import random

import aot
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
    for impl in ("reference", "triton"):
        for groups in ({"group_ids": torch.empty(0, dtype=torch.int64)}, {"cu_groups": torch.zeros(1).int()}):
            result = group_advantage(torch.empty(0), **groups, impl=impl)
            assert [x.shape for x in result] == [(0,)] * 4
            assert [x.dtype for x in result] == [torch.float32] * 3 + [torch.bool]


# ---- equal but for rounding ------------------------------------------------------------------------------------

HALF = math.sqrt(0.5)  # advantage of the better of two
MODES = ["mean_std", "mean", "rloo", "batch_std"]
NEXT = math.nextafter(0.7, 1.0)
SAME = [
    ([0.1 + 0.2, 0.3, 0.3, 0.3], torch.float64),
    ([0.7, NEXT, math.nextafter(NEXT, 1.0)], torch.float64),
    ([-1e-30, -math.nextafter(1e-30, 1.0)], torch.float64),
    ([sum([0.1] * 10), 1.0, sum([0.01] * 100)], torch.float64),
    ([1e20, math.nextafter(1e20, 0.0)], torch.float64),
    ([1.0, 1.0 + 2**-23, 1.0 - 2**-24], torch.float32),
]
OTHER = [  # small is not equal: neither beside 0 nor beside something large
    ([1e-30, 0.0], torch.float64),
    ([1e-17, -1e-17], torch.float64),
    ([1.0, 1.0 + 1e-12], torch.float64),
    ([1e8, 1e8 + 1e-5], torch.float64),
    ([1.0, 1.00001], torch.float32),
    ([1e6, 1e6 + 1], torch.float32),
    ([1.0, 1.0 - 2**-8], torch.bfloat16),
    ([1.0, 1.0 - 2**-11], torch.float16),
]


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("groups", ["cu_groups", "group_ids"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("values", "dtype"), SAME)
def test_rewards_that_differ_by_their_rounding_are_equal(values, dtype, mode, groups, impl):
    # Another group has a signal, without which batch_std divides by nothing.
    rewards = torch.tensor([*values, 1.0, 0.0], dtype=dtype)
    ends = torch.tensor([0, len(values), len(rewards)])
    where = (
        {"cu_groups": ends} if groups == "cu_groups" else {"group_ids": torch.arange(2).repeat_interleave(ends.diff())}
    )
    result = group_advantage(rewards, **where, mode=mode, impl=impl)
    assert result.advantage[:-2].tolist() == [0.0] * len(values)
    assert not result.is_active[:-2].any() and result.is_active[-2:].all()
    assert mode == "batch_std" or result.std[:-2].tolist() == [0.0] * len(values)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("groups", ["cu_groups", "group_ids"])
@pytest.mark.parametrize("mode", ["mean_std", "batch_std"])
@pytest.mark.parametrize(("values", "dtype"), OTHER)
def test_true_differences_keep_their_scale_however_small(values, dtype, mode, groups, impl):
    where = {"cu_groups": torch.tensor([0, 2])} if groups == "cu_groups" else {"group_ids": torch.zeros(2).long()}
    result = group_advantage(torch.tensor(values, dtype=dtype), **where, mode=mode, impl=impl)
    sign = 1.0 if values[0] > values[1] else -1.0
    # The mean of 1 and 1 + 1e-12 is rounded by 1e-16.
    assert result.advantage.tolist() == pytest.approx([sign * HALF, -sign * HALF], rel=2e-3)
    assert result.is_active.all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("values", "dtype"), SAME)
def test_a_batch_that_is_equal_but_for_rounding_has_no_deviation(values, dtype, impl):
    rewards = torch.tensor(values, dtype=dtype)
    result = group_advantage(rewards, cu_groups=torch.tensor([0, 1, len(rewards)]), mode="batch_std", impl=impl)
    assert result.std.tolist() == result.advantage.tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("values", [[math.inf, math.inf], [math.inf, 1.0], [-math.inf, math.inf], [math.nan, math.nan]])
def test_infinite_rewards_are_equal_to_nothing(values, impl):
    cu = torch.tensor([0, len(values)])
    result = group_advantage(torch.tensor(values), cu_groups=cu, nan="propagate", impl=impl)
    assert not result.advantage.isfinite().any() and result.is_active.all()


# ---- the other modes -------------------------------------------------------------------------------------------

# Two groups: 3 0 0 1 and 2 2; the batch has mean 4/3 and squared deviations 22/3.
REWARDS, CU = torch.tensor([3.0, 0.0, 0.0, 1.0, 2.0, 2.0]), torch.tensor([0, 4, 6])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_leave_one_out_by_hand(impl):
    # The others of 3 have mean 1/3, those of 0 have 4/3, those of 1 have 1.
    result = group_advantage(REWARDS, cu_groups=CU, mode="rloo", impl=impl)
    assert result.advantage.tolist() == pytest.approx([8 / 3, -4 / 3, -4 / 3, 0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_batch_deviation_by_hand(impl):
    result = group_advantage(REWARDS, cu_groups=CU, mode="batch_std", impl=impl)
    std = math.sqrt(22 / 3 / 5)
    assert result.advantage.tolist() == pytest.approx([2 / std, -1 / std, -1 / std, 0.0, 0.0, 0.0], abs=1e-6)
    assert result.std.tolist() == pytest.approx([std] * 6, abs=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("mode", "divisor"), [("add", math.sqrt(2) + 0.5), ("clamp", math.sqrt(2))])
def test_epsilon_by_hand(mode, divisor, impl):
    rewards, cu = torch.tensor([3.0, 0.0, 0.0, 1.0, 0.25, -0.25]), torch.tensor([0, 4, 6])
    result = group_advantage(rewards, cu_groups=cu, eps=0.5, eps_mode=mode, impl=impl)
    assert result.advantage[0].item() == pytest.approx(2 / divisor, abs=1e-6)
    small = math.sqrt(1 / 8)  # of the second group, below the epsilon
    assert result.advantage[4].item() == pytest.approx(0.25 / (small + 0.5 if mode == "add" else 0.5), abs=1e-6)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("mode", "raw"), [("mean_std", 4 / 1.5), ("mean", 4.0), ("rloo", 4.0)])
def test_a_lone_sample_keeps_its_reward_if_asked(mode, raw, impl):
    options = {"cu_groups": torch.tensor([0, 1, 3]), "mode": mode, "eps": 0.5, "impl": impl}
    rewards = torch.tensor([4.0, 1.0, 0.0])
    assert group_advantage(rewards, **options).advantage[0].item() == 0.0
    result = group_advantage(rewards, **options, singleton="raw")
    assert result.advantage[0].item() == pytest.approx(raw)
    assert torch.equal(result.advantage[1:], group_advantage(rewards, **options).advantage[1:])


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["mean_std", "mean", "rloo", "batch_std"])
def test_unknown_rewards_are_left_out_or_spoil_their_group(mode, bad, impl):
    rewards, cu = torch.tensor([1.0, bad, 0.0, 1.0, 3.0, 2.0]), torch.tensor([0, 4, 6])
    known = [0, 2, 3, 4, 5]
    wanted = group_advantage(rewards[known], cu_groups=torch.tensor([0, 3, 5]), mode=mode, impl=impl)
    found = group_advantage(rewards, cu_groups=cu, mode=mode, nan="zero", impl=impl)
    assert all(torch.equal(x[known], y) for x, y in zip(found, wanted, strict=True))
    assert found.advantage[1].item() == 0.0
    spoiled = group_advantage(rewards, cu_groups=cu, mode=mode, nan="propagate", eps=0.1, eps_mode="clamp", impl=impl)
    assert not spoiled.advantage[:4].isfinite().any()
    assert spoiled.advantage[4:].isfinite().all() == (mode != "batch_std")


# ---- Triton ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ddof": 0, "eps": 1e-4, "singleton": "raw"},
        {"mode": "mean"},
        {"mode": "rloo", "singleton": "raw"},
        {"mode": "batch_std", "eps": 0.5, "eps_mode": "clamp"},
        {"mode": "batch_std", "nan": "zero", "singleton": "raw"},
        {"nan": "propagate"},
    ],
)
def test_triton_equals_the_reference_in_every_order(options):
    # Group sizes around the block, an empty and a lone one; equal rewards; 183 samples make several programs.
    sizes = torch.tensor([1, 16, 3, 0, 129, 1, 2, 31])
    ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(len(ids), generator=generator, dtype=torch.float64) + 1e6
    rewards[1:17] = 0.1 + 0.2
    if "nan" in options:
        rewards[[18, -1]] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    cu = torch.tensor([0, *sizes]).cumsum(0)
    wanted = group_advantage(rewards, cu_groups=cu, impl="reference", **options)
    found = group_advantage(rewards, cu_groups=cu, impl="triton", **options)
    order = torch.randperm(len(ids), generator=generator)
    shuffled = group_advantage(rewards[order], ids[order], impl="triton", **options)
    for x, y, z in zip(found, wanted, shuffled, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(z, y[order], rtol=1e-6, atol=1e-6, equal_nan=True)
    again = group_advantage(rewards, cu_groups=cu, impl="triton", **options)
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(again, found, strict=True))


@pytest.mark.machine_code
def test_compiled_kernels_are_lean():
    outputs = {"advantage_ptr": "*fp32", "mean_ptr": "*fp32", "std_ptr": "*fp32", "active_ptr": "*i8"}
    signature = {"rewards_ptr": "*fp32", "num_samples": "i32", "ddof": "i32", "eps": "fp32"} | outputs
    flags = {"MODE": "mean_std", "CLAMPS": False, "RAW": False, "SKIPS": False, "ROUNDING": 0.0, "BATCH": 1024}
    module = "r1kernels.group_advantage.triton_impl"
    integers = ("num_samples", "num_groups", "ddof")
    made = aot.compile_triton(
        [
            aot.Kernel(
                f"{module}:segment_kernel",
                signature | {"cu_groups_ptr": "*i32", "num_groups": "i32"},
                flags | {"BLOCK": 128},
                num_warps=1,
                unaligned=integers,
            ),
            aot.Kernel(
                f"{module}:ids_kernel",
                signature | {"ids_ptr": "*i64"},
                flags | {"SAMPLES": 16, "OTHERS": 64},
                unaligned=integers,
            ),
        ]
    )
    assert [m.spill_free for m in made] == [True, True]
    assert all(m.registers <= 255 for m in made)


# ---- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "ids", "options", "message"),
    [
        (torch.zeros(2).long(), torch.zeros(2).long(), {}, "rewards must be floating point, got torch.int64"),
        (torch.zeros(2, 2), torch.zeros(2, 2).long(), {}, "rewards must be [N], got (2, 2)"),
        (torch.zeros(2), torch.zeros(3).long(), {}, "group_ids must be int64 (2,) on cpu, got torch.int64 (3,) on cpu"),
        (torch.zeros(2), torch.zeros(2).int(), {}, "group_ids must be int64 (2,) on cpu, got torch.int32 (2,) on cpu"),
        (torch.zeros(2), None, {}, "one of group_ids and cu_groups is required, got none"),
        (
            torch.zeros(2),
            torch.zeros(2).long(),
            {"cu_groups": torch.tensor([0, 2])},
            "one of group_ids and cu_groups is required, got both",
        ),
        (torch.zeros(2), None, {"cu_groups": torch.tensor([0, 3])}, "cu_groups must rise from 0 to 2, got [0, 3]"),
        (
            torch.zeros(2),
            None,
            {"cu_groups": torch.tensor([0.0, 2.0])},
            "cu_groups must be [G+1] int32 or int64 on cpu, got torch.float32 (2,) on cpu",
        ),
        (
            torch.zeros(2),
            torch.zeros(2).long(),
            {"mode": "median"},
            "mode must be one of mean_std, mean, rloo, batch_std, got 'median'",
        ),
        (torch.zeros(2), torch.zeros(2).long(), {"eps": -1.0}, "eps must be >= 0, got -1.0"),
        (
            torch.zeros(2),
            torch.zeros(2).long(),
            {"nan": "skip"},
            "nan must be one of error, zero, propagate, got 'skip'",
        ),
        (torch.zeros(2), torch.zeros(2).long(), {"ddof": 2}, "ddof must be 0 or 1, got 2"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2).long(), {}, "rewards must be finite, got nan at 1"),
        (torch.tensor([math.inf, 0.0]), torch.zeros(2).long(), {}, "rewards must be finite, got inf at 0"),
        (torch.zeros(2), torch.tensor([0, -1]), {}, "group_ids must be >= 0, got -1"),
        (
            torch.zeros(2),
            torch.zeros(2).long(),
            {"impl": "cuda"},
            "impl='cuda' does not exist; this op has triton, reference",
        ),
    ],
)
def test_error(rewards, ids, options, message):
    with pytest.raises(ValueError) as caught:
        group_advantage(rewards, ids, **options)
    assert str(caught.value) == f"group_advantage: {message}"
