"""moe_plan against a plain-Python sort, at the borders of its domain."""

from __future__ import annotations

import pytest
import torch

from r1kernels import moe_plan
from r1kernels.moe_plan import max_rows


def random_ids(num_tokens: int, topk: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts for each token, some far more popular than others."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.rand(num_experts, generator=generator) ** 3 + 1e-3
    if not num_tokens:
        return torch.zeros(0, topk, dtype=torch.int32)
    return torch.multinomial(popularity.expand(num_tokens, -1), topk, generator=generator).int()


def check(ids: torch.Tensor, num_experts: int, align: int, plan) -> None:
    """The plan is the one that Python's sort gives."""
    topk = ids.shape[1]
    flat = ids.flatten().tolist()
    first, rows = 0, {}
    for expert in range(num_experts):
        slots = [slot for slot, own in enumerate(flat) if own == expert]
        assert plan.offsets[expert] == first
        assert plan.counts[expert] == len(slots)
        rows |= {first + i: (slot, expert) for i, slot in enumerate(slots)}
        first += -(-len(slots) // align) * align
    assert plan.offsets[num_experts] == first <= plan.num_rows
    assert plan.slot_of.tolist() == [rows.get(row, (-1, -1))[0] for row in range(plan.num_rows)]
    assert plan.expert_of.tolist() == [rows.get(row, (-1, -1))[1] for row in range(plan.num_rows)]
    assert plan.token_of.tolist() == [slot // topk if slot >= 0 else -1 for slot in plan.slot_of.tolist()]
    row_of = {slot: row for row, (slot, _) in rows.items()}
    assert plan.row_of.flatten().tolist() == [row_of.get(slot, -1) for slot in range(len(flat))]
    assert {t.dtype for t in (plan.row_of, plan.slot_of, plan.expert_of, plan.offsets, plan.counts)} == {torch.int32}


@pytest.mark.parametrize("align", [1, 16, 128])
@pytest.mark.parametrize(
    ("num_tokens", "topk", "num_experts"),
    [(0, 8, 256), (1, 1, 1), (7, 1, 1), (5, 4, 4), (33, 3, 7), (200, 8, 256), (129, 6, 40)],
)
def test_rows_are_sorted_by_expert_then_token(num_tokens, topk, num_experts, align):
    ids = random_ids(num_tokens, topk, num_experts)
    check(ids, num_experts, align, moe_plan(ids, num_experts, align=align))


def test_all_tokens_to_one_expert():
    ids = torch.full((130, 1), 3, dtype=torch.int32)
    plan = moe_plan(ids, 8)
    check(ids, 8, 128, plan)
    assert plan.offsets.tolist() == [0, 0, 0, 0, 256, 256, 256, 256, 256]


def test_absent_choices_have_no_row():
    ids = random_ids(50, 4, 10)
    ids[::3] = -1
    ids[1::5, 2] = -1
    plan = moe_plan(ids, 10, align=8)
    check(ids, 10, 8, plan)
    assert torch.equal(plan.row_of < 0, ids < 0)


@pytest.mark.parametrize("align", [1, 16, 128])
def test_rows_are_as_many_as_the_known_choices_can_need(align):
    ids = random_ids(50, 8, 10)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.8] = -1  # other ranks'
    num_choices = int((ids >= 0).sum())
    plan = moe_plan(ids, 10, align=align, num_choices=num_choices)
    check(ids, 10, align, plan)
    assert plan.num_rows == max_rows(num_choices, 10, align) < moe_plan(ids, 10, align=align).num_rows
    nowhere = moe_plan(torch.full((3, 2), -1, dtype=torch.int32), 10, align=align, num_choices=0)
    assert nowhere.num_rows == 0 and nowhere.offsets.tolist() == [0] * 11


def test_more_choices_than_the_host_was_told_of_are_refused():
    with pytest.raises(ValueError, match="moe_plan: num_choices is 2, but 3 ids are not -1"):
        moe_plan(torch.tensor([[0, 1], [2, -1]], dtype=torch.int32), 4, num_choices=2)


def test_by_hand():
    plan = moe_plan(torch.tensor([[2, 0], [0, 1], [2, 1]], dtype=torch.int32), 4, align=4)
    assert plan.counts.tolist() == [2, 2, 2, 0]
    assert plan.offsets.tolist() == [0, 4, 8, 12, 12]
    assert plan.row_of.tolist() == [[8, 0], [1, 4], [9, 5]]
    assert plan.slot_of.tolist()[:12] == [1, 2, -1, -1, 3, 5, -1, -1, 0, 4, -1, -1]


@pytest.mark.parametrize(("choices", "experts", "align"), [(0, 4, 128), (1, 4, 128), (3, 2, 4), (9, 4, 8), (100, 3, 7)])
def test_max_rows_is_the_worst_case(choices, experts, align):
    def padded(counts: list[int]) -> int:
        return sum(-(-count // align) * align for count in counts)

    def splits(total: int, parts: int):
        if parts == 1:
            yield [total]
            return
        for first in range(total + 1):
            yield from ([first, *rest] for rest in splits(total - first, parts - 1))

    assert max_rows(choices, experts, align) == max(padded(counts) for counts in splits(choices, experts))


@pytest.mark.parametrize(
    ("ids", "num_experts", "align", "message"),
    [
        (torch.zeros(2, 2).long(), 4, 128, "ids must be contiguous int32 [T, K] with K <= 32, got torch.int64 (2, 2)"),
        (torch.zeros(2).int(), 4, 128, "ids must be contiguous int32 [T, K] with K <= 32, got torch.int32 (2,)"),
        (torch.zeros(2, 33).int(), 4, 128, "ids must be contiguous int32 [T, K] with K <= 32, got torch.int32 (2, 33)"),
        (torch.zeros(2, 2).int(), 0, 128, "num_experts must be in [1, 1024], got 0"),
        (torch.zeros(2, 2).int(), 4, 0, "align must be >= 1, got 0"),
        (torch.tensor([[0, 4]]).int(), 4, 128, "ids must be in [0, 4) or -1, got 0 .. 4"),
        (torch.tensor([[0, -2]]).int(), 4, 128, "ids must be in [0, 4) or -1, got -2 .. 0"),
        (
            torch.empty(1 << 28, 8, dtype=torch.int32, device="meta"),
            4,
            128,
            "2147483648 choices are too many: padded rows must be fewer than 2^31",
        ),
    ],
)
def test_error(ids, num_experts, align, message):
    with pytest.raises(ValueError) as caught:
        moe_plan(ids, num_experts, align=align)
    assert str(caught.value) == f"moe_plan: {message}"
