"""group_advantage in one launch, in float64: a program a group, or a program a block of samples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128  # members of a group taken at once
SAMPLES = 16  # samples of a program when groups are given by their numbers
OTHERS = 64  # samples it compares them with at once
BATCH = 1024  # samples taken at once for the standard deviation of the batch
MAX_PROGRAMS = 1056  # eight on each of an H100's 132 multiprocessors


@triton.jit
def _rewards(rewards_ptr, offsets, inside, SKIPS: tl.constexpr):
    """-> rewards as float64, 0 where not counted; whether they count."""
    r = tl.load(rewards_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    if SKIPS:
        # NaN - NaN and inf - inf are NaN, which equals nothing.
        inside = inside & (r - r == 0.0)
    return tl.where(inside, r, 0.0), inside


@triton.jit
def _is_equal(high, low, mean, ROUNDING: tl.constexpr):
    """Whether rewards between `low` and `high` differ by no more than their rounding; NaN and inf never do."""
    spread = high - low
    # A NaN among the rewards makes their mean NaN, though comparisons pass it over.
    is_near = spread <= ROUNDING * tl.maximum(tl.abs(high), tl.abs(low))
    return is_near & (spread < float("inf")) & (mean == mean)


@triton.jit
def _batch_std(rewards_ptr, num_samples, ddof, SKIPS: tl.constexpr, BATCH: tl.constexpr, ROUNDING: tl.constexpr):
    """Standard deviation of all rewards; every program takes it for itself, in the same order."""
    lanes = tl.arange(0, BATCH)
    total, count, squares = (tl.zeros([BATCH], tl.float64),) * 3
    high, low = tl.full([BATCH], float("-inf"), tl.float64), tl.full([BATCH], float("inf"), tl.float64)
    for first in range(0, num_samples, BATCH):
        r, counts = _rewards(rewards_ptr, first + lanes, first + lanes < num_samples, SKIPS)
        total += r
        count += counts.to(tl.float64)
        high, low = tl.where(counts & (r > high), r, high), tl.where(counts & (r < low), r, low)
    number = tl.sum(count)
    zero = tl.zeros([BATCH], tl.float64)
    mean = zero + tl.sum(total) / tl.maximum(number, 1.0)
    is_equal = _is_equal(zero + tl.max(high), zero + tl.min(low), mean, ROUNDING)
    for first in range(0, num_samples, BATCH):
        r, counts = _rewards(rewards_ptr, first + lanes, first + lanes < num_samples, SKIPS)
        squares += tl.where(counts & ~is_equal, (r - mean) * (r - mean), 0.0)
    return tl.sqrt(tl.sum(squares) / tl.maximum(number - ddof, 1.0))


@triton.jit
def _store(
    advantage_ptr,
    mean_ptr,
    std_ptr,
    active_ptr,
    offsets,
    inside,
    r,
    counts,
    count,
    mean,
    std,
    is_equal,
    eps,
    MODE: tl.constexpr,
    CLAMPS: tl.constexpr,
    RAW: tl.constexpr,
):
    """The advantages of a tile of samples from the statistics of their groups."""
    one = tl.full(r.shape, 1.0, tl.float64)
    if MODE == "mean" or MODE == "rloo":
        scale = one
    elif CLAMPS:
        scale = tl.where(std < eps, eps, std)  # a NaN stays one
    else:
        scale = std + eps
    centered = tl.where(counts & ~is_equal, r - mean, 0.0)
    if MODE == "rloo":
        centered = centered * (count / tl.maximum(count - 1.0, 1.0))
    if RAW:
        is_single = counts & (count == 1.0)
        centered = tl.where(is_single, r, centered)
        if MODE == "mean_std":
            scale = tl.where(is_single, tl.maximum(one, eps) if CLAMPS else one + eps, scale)
    advantage = tl.where(centered == 0.0, 0.0, centered / tl.where(centered == 0.0, 1.0, scale))
    tl.store(advantage_ptr + offsets, advantage.to(tl.float32), mask=inside)
    tl.store(mean_ptr + offsets, mean.to(tl.float32), mask=inside)
    tl.store(std_ptr + offsets, std.to(tl.float32), mask=inside)
    tl.store(active_ptr + offsets, (~is_equal).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["num_samples", "num_groups", "ddof"])
def segment_kernel(
    rewards_ptr,  # [N] float
    cu_groups_ptr,  # [G + 1] int
    advantage_ptr,  # [N] f32, out
    mean_ptr,  # [N] f32, out
    std_ptr,  # [N] f32, out
    active_ptr,  # [N] i8, out
    num_samples,
    num_groups,
    ddof,
    eps,
    MODE: tl.constexpr,
    CLAMPS: tl.constexpr,
    RAW: tl.constexpr,
    SKIPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Groups one after the other; program p has every group p, p + programs, ..."""
    lanes = tl.arange(0, BLOCK)
    batch_std = 0.0
    if MODE == "batch_std":
        batch_std = _batch_std(rewards_ptr, num_samples, ddof, SKIPS, BATCH, ROUNDING)
    for group in range(tl.program_id(0), num_groups, tl.num_programs(0)):
        start = tl.load(cu_groups_ptr + group).to(tl.int64)
        end = tl.load(cu_groups_ptr + group + 1).to(tl.int64)
        total, number, squares = (tl.zeros([BLOCK], tl.float64),) * 3
        high, low = tl.full([BLOCK], float("-inf"), tl.float64), tl.full([BLOCK], float("inf"), tl.float64)
        for first in range(start, end, BLOCK):
            r, counts = _rewards(rewards_ptr, first + lanes, first + lanes < end, SKIPS)
            total += r
            number += counts.to(tl.float64)
            high, low = tl.where(counts & (r > high), r, high), tl.where(counts & (r < low), r, low)
        # As tiles, so that one _store serves both kernels.
        zero = tl.zeros([BLOCK], tl.float64)
        count, highest, lowest = zero + tl.sum(number), zero + tl.max(high), zero + tl.min(low)
        mean = (zero + tl.sum(total)) / tl.maximum(count, 1.0)
        is_equal = _is_equal(highest, lowest, mean, ROUNDING) | (count == 0.0)
        for first in range(start, end, BLOCK):
            r, counts = _rewards(rewards_ptr, first + lanes, first + lanes < end, SKIPS)
            squares += tl.where(counts & ~is_equal, (r - mean) * (r - mean), 0.0)
        std = tl.sqrt((zero + tl.sum(squares)) / tl.maximum(count - ddof, 1.0))
        if MODE == "batch_std":
            std = zero + batch_std
        for first in range(start, end, BLOCK):
            offsets = first + lanes
            r, counts = _rewards(rewards_ptr, offsets, offsets < end, SKIPS)
            _store(
                advantage_ptr, mean_ptr, std_ptr, active_ptr, offsets, offsets < end,
                r, counts, count, mean, std, is_equal, eps, MODE, CLAMPS, RAW,
            )  # fmt: skip


@triton.jit
def _matches(ids, rewards_ptr, ids_ptr, first, num_samples, SKIPS: tl.constexpr, OTHERS: tl.constexpr):
    """-> rewards of a block of samples [1, OTHERS], and which of the ids [SAMPLES] they belong with."""
    offsets = first + tl.arange(0, OTHERS)
    inside = offsets < num_samples
    other_ids = tl.load(ids_ptr + offsets, mask=inside, other=-1)
    r, counts = _rewards(rewards_ptr, offsets, inside, SKIPS)
    return r[None, :], (ids[:, None] == other_ids[None, :]) & counts[None, :]


@triton.jit
def _may_match(low_id, high_id, ids_ptr, first, num_samples, OTHERS: tl.constexpr):
    """Whether a block of samples has ids in [low_id, high_id]: neighbours of a question are the usual order."""
    offsets = first + tl.arange(0, OTHERS)
    ids = tl.load(ids_ptr + offsets, mask=offsets < num_samples, other=-1)
    return tl.max(((ids >= low_id) & (ids <= high_id)).to(tl.int32)) > 0


@triton.jit(do_not_specialize=["num_samples", "ddof"])
def ids_kernel(
    rewards_ptr,  # [N] float
    ids_ptr,  # [N] i64
    advantage_ptr,  # [N] f32, out
    mean_ptr,  # [N] f32, out
    std_ptr,  # [N] f32, out
    active_ptr,  # [N] i8, out
    num_samples,
    ddof,
    eps,
    MODE: tl.constexpr,
    CLAMPS: tl.constexpr,
    RAW: tl.constexpr,
    SKIPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    SAMPLES: tl.constexpr,
    OTHERS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Groups in any order; program p has SAMPLES samples and finds the members of their groups among all."""
    own = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    inside = own < num_samples
    ids = tl.load(ids_ptr + own, mask=inside, other=-2)
    low_id = tl.min(tl.where(inside, ids, 0x7FFFFFFFFFFFFFFF))
    high_id = tl.max(ids)
    total, count, squares = (tl.zeros([SAMPLES], tl.float64),) * 3
    high, low = tl.full([SAMPLES], float("-inf"), tl.float64), tl.full([SAMPLES], float("inf"), tl.float64)
    for first in range(0, num_samples, OTHERS):
        if _may_match(low_id, high_id, ids_ptr, first, num_samples, OTHERS):
            r, is_member = _matches(ids, rewards_ptr, ids_ptr, first, num_samples, SKIPS, OTHERS)
            total += tl.sum(tl.where(is_member, r, 0.0), axis=1)
            count += tl.sum(is_member.to(tl.float64), axis=1)
            high = tl.maximum(high, tl.max(tl.where(is_member, r, float("-inf")), axis=1))
            low = tl.minimum(low, tl.min(tl.where(is_member, r, float("inf")), axis=1))
    mean = total / tl.maximum(count, 1.0)
    is_equal = _is_equal(high, low, mean, ROUNDING) | (count == 0.0)
    for first in range(0, num_samples, OTHERS):
        if _may_match(low_id, high_id, ids_ptr, first, num_samples, OTHERS):
            r, is_member = _matches(ids, rewards_ptr, ids_ptr, first, num_samples, SKIPS, OTHERS)
            deviation = r - mean[:, None]
            squares += tl.sum(tl.where(is_member & (~is_equal)[:, None], deviation * deviation, 0.0), axis=1)
    std = tl.sqrt(squares / tl.maximum(count - ddof, 1.0))
    if MODE == "batch_std":
        std = tl.zeros([SAMPLES], tl.float64) + _batch_std(rewards_ptr, num_samples, ddof, SKIPS, BATCH, ROUNDING)
    r, counts = _rewards(rewards_ptr, own, inside, SKIPS)
    _store(
        advantage_ptr, mean_ptr, std_ptr, active_ptr, own, inside,
        r, counts, count, mean, std, is_equal, eps, MODE, CLAMPS, RAW,
    )  # fmt: skip


def group_advantage_triton(
    rewards: torch.Tensor,
    group_ids: torch.Tensor | None,
    cu_groups: torch.Tensor | None,
    *,
    mode: str,
    ddof: int,
    eps: float,
    clamps: bool,
    raw: bool,
    skips: bool,
    rounding: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (advantage, mean, std, is_active), each [N]; one launch."""
    rewards, number = rewards.contiguous(), rewards.numel()
    advantage, mean, std = (rewards.new_empty(number, dtype=torch.float32) for _ in range(3))
    is_active = rewards.new_empty(number, dtype=torch.bool)
    outputs = advantage, mean, std, is_active
    if not number:
        return outputs
    flags = {"MODE": mode, "CLAMPS": clamps, "RAW": raw, "SKIPS": skips, "ROUNDING": rounding, "BATCH": BATCH}
    raw_outputs = advantage, mean, std, is_active.view(torch.int8)
    with torch.cuda.device_of(rewards):
        if cu_groups is not None:
            groups = cu_groups.numel() - 1
            # For batch_std each program goes through the whole batch once: as few as fill the GPU.
            grid = (min(groups, MAX_PROGRAMS if mode != "batch_std" else MAX_PROGRAMS // 8),)
            warps = 1 if mode != "batch_std" else 4
            numbers = number, groups, ddof, eps
            segment_kernel[grid](
                rewards, cu_groups.contiguous(), *raw_outputs, *numbers, **flags, BLOCK=BLOCK, num_warps=warps
            )
        else:
            assert group_ids is not None  # one of the two is given
            grid = (triton.cdiv(number, SAMPLES),)
            sizes = {"SAMPLES": SAMPLES, "OTHERS": OTHERS}
            ids_kernel[grid](rewards, group_ids.contiguous(), *raw_outputs, number, ddof, eps, **flags, **sizes)
    return outputs
