"""pack: weights, the index convention, and that no choice of layout reaches the loss."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from r1engine import batch
from r1engine.batch import (
    Completion,
    PackedBatch,
    Prompt,
    RowShape,
    Sample,
    Sequence,
    TokenOutputs,
    pack,
    pack_units,
    to_sequences,
)
from r1engine.config import Grpo
from r1engine.data.question import Question
from r1engine.grpo import objective

VOCAB = 11


def sample(prompt: list[int], answer: list[int], advantage: float = 1.0, is_masked: bool = False) -> Sample:
    question = Prompt(id=0, tokens=prompt, text="", question=Question(""))
    logp = [-0.1 * (i + 1) for i in range(len(answer))]
    return Sample(Completion(question, 0, answer, logp, "", truncated=False), advantage, is_masked)


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of 1 to 4 tokens, answers of 1 to 8, every third advantage 0."""
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(1, most))]

    return [sample(tokens(4), tokens(8), draw.gauss(0, 1) if i % 3 else 0.0) for i in range(count)]


def flat(shards: list[list[PackedBatch]]) -> list[PackedBatch]:
    return [row for rows in shards for row in rows]


def sequences_of(row: PackedBatch) -> list[tuple[list[int], list[float], list[float], list[float]]]:
    """(tokens, weights, advantages, rollout logp) of each sequence of a row."""
    bounds = row.cu_seqlens.tolist()
    columns = (row.tokens, row.loss_weight, row.advantage, row.rollout_logp)
    return [tuple(x[a:b].tolist() for x in columns) for a, b in pairwise(bounds)]


def bigram_logp(table: torch.Tensor, row: PackedBatch) -> torch.Tensor:
    """A model that knows the token before: entry t is log p(tokens[t] | tokens[t-1]), 0 where a sequence starts."""
    logp = table.log_softmax(1)[row.tokens.roll(1), row.tokens]
    return torch.where(row.positions == 0, 0.0, logp)


def loss_and_gradient(shards: list[list[PackedBatch]], kl_coef: float = 0.0) -> tuple[float, torch.Tensor]:
    """Of the GRPO objective with the bigram model, added up over all rows of all shards."""
    generator = torch.Generator().manual_seed(1)
    table, old, ref = (torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64) for _ in range(3))
    table.requires_grad_()
    cfg = Grpo(clip_eps=0.2, kl_coef=kl_coef)
    total = torch.zeros((), dtype=torch.float64)
    for row in flat(shards):
        row = replace(row, old_logp=bigram_logp(old, row), ref_logp=bigram_logp(ref, row))
        outputs = TokenOutputs(bigram_logp(table, row), torch.zeros(len(row.tokens)))
        total = total + objective(outputs, row, cfg)[0]
    (gradient,) = torch.autograd.grad(total, table)
    return total.item(), gradient


# ---- weights ---------------------------------------------------------------------------------------------------

THREE = [sample([1], [2] * 2), sample([1], [3] * 5), sample([1, 1], [4])]  # answers of 2, 5 and 1 tokens


@pytest.mark.parametrize(
    ("weighting", "two", "five", "one"),
    [
        ("sequence_mean", 1 / 6, 1 / 15, 1 / 3),  # 1 / (3 samples * length)
        ("token_mean", 1 / 8, 1 / 8, 1 / 8),  # 2 + 5 + 1 tokens
        ("constant", 1 / 30, 1 / 30, 1 / 30),  # 1 / (3 samples * 10)
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_by_hand(weighting, two, five, one, shards):
    rows = flat(
        pack(to_sequences(THREE, weighting=weighting, constant_tokens=10), RowShape(max_tokens=6, shards=shards))
    )
    found = {tuple(tokens): weights for row in rows for tokens, weights, _, _ in sequences_of(row)}
    assert found[1, 2, 2] == pytest.approx([0, two, two])
    assert found[1, 3, 3, 3, 3, 3] == pytest.approx([0, *[five] * 5])
    assert found[1, 1, 4] == pytest.approx([0, 0, one])


@pytest.mark.parametrize("weighting", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize(("max_tokens", "shards", "multiple"), [(12, 1, 1), (40, 3, 4), (17, 2, 8)])
def test_weights_of_all_rows_of_all_shards_sum_to_one(weighting, max_tokens, shards, multiple):
    samples = [*random_samples(20), sample([1], [2, 3], is_masked=True)]
    rows = flat(
        pack(
            to_sequences(samples, weighting=weighting),
            RowShape(max_tokens=max_tokens, shards=shards, multiple=multiple),
        )
    )
    assert sum(row.loss_weight.double().sum().item() for row in rows) == pytest.approx(1.0, abs=1e-6)


# ---- the layout does not matter --------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_loss_and_gradient_do_not_depend_on_the_layout(weighting, kl_coef):
    samples = random_samples(20)
    alone = [pack(to_sequences(samples, weighting=weighting), RowShape(max_tokens=12, shards=20))]  # one sequence a row
    wanted, gradient = loss_and_gradient(flat(alone), kl_coef)
    assert gradient.abs().max() > 1e-3
    for max_tokens, shards, multiple in [(12, 1, 1), (1000, 1, 1), (40, 3, 1), (24, 2, 8), (50, 5, 7)]:
        packed = pack(
            to_sequences(samples, weighting=weighting),
            RowShape(max_tokens=max_tokens, shards=shards, multiple=multiple),
        )
        loss, found = loss_and_gradient(packed, kl_coef)
        assert loss == pytest.approx(wanted, rel=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighting", ["sequence_mean", "token_mean", "constant"])
def test_leaving_out_zero_advantages_changes_neither_loss_nor_gradient(weighting):
    samples = random_samples(20)
    whole = pack(to_sequences(samples, weighting=weighting), RowShape(max_tokens=24, shards=2))
    less = pack(to_sequences(samples, weighting=weighting, skip_zero_advantage=True), RowShape(max_tokens=24, shards=2))
    num_tokens = [sum(len(row.tokens) for row in flat(shards)) for shards in (whole, less)]
    assert num_tokens[1] < num_tokens[0]
    (loss, gradient), (less_loss, less_gradient) = loss_and_gradient(whole), loss_and_gradient(less)
    assert less_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(less_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_zero_advantages_stay_where_a_kl_term_needs_them():
    assert len(sequences_of(pack(to_sequences([sample([1], [2], 0.0)]), RowShape(max_tokens=9))[0][0])) == 1
    assert sequences_of(pack(to_sequences([sample([1], [2], 0.0)]), RowShape(max_tokens=9))[0][0])[0][1] == [0.0, 1.0]


@pytest.mark.parametrize("weighting", ["sequence_mean", "token_mean", "constant"])
def test_masked_samples_take_no_part(weighting):
    masked = [sample([9], [9, 9], 5.0, is_masked=True), sample([9, 9], [9], -5.0, is_masked=True)]
    with_masked = pack(
        to_sequences([masked[0], *THREE, masked[1]], weighting=weighting, constant_tokens=10), RowShape(max_tokens=20)
    )
    without = pack(to_sequences(THREE, weighting=weighting, constant_tokens=10), RowShape(max_tokens=20))
    assert [sequences_of(row) for row in flat(with_masked)] == [sequences_of(row) for row in flat(without)]


def test_a_batch_of_masked_samples_only_is_a_row_of_weight_zero():
    rows = flat(pack(to_sequences([sample([1], [2], is_masked=True)]), RowShape(max_tokens=8)))
    assert [row.loss_weight.tolist() for row in rows] == [[0.0]]


# ---- rows ------------------------------------------------------------------------------------------------------


def test_entry_t_belongs_to_token_t():
    (row,) = pack(to_sequences([sample([5, 6], [7, 8, 9], 2.0), sample([3], [4], -1.0)]), RowShape(max_tokens=10))[0]
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 5, 7]
    assert row.max_seqlen == 5
    assert row.advantage.tolist() == [0, 0, 2, 2, 2, 0, -1]
    assert row.loss_weight.tolist() == pytest.approx([0, 0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 2])
    assert row.rollout_logp.tolist() == pytest.approx([0, 0, -0.1, -0.2, -0.3, 0, -0.1])
    assert (row.old_logp, row.ref_logp) == (None, None)
    assert (row.tokens.dtype, row.positions.dtype, row.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert {x.dtype for x in (row.advantage, row.loss_weight, row.rollout_logp)} == {torch.float32}


def test_a_row_goes_to_a_device_with_all_its_tensors():
    (row,) = pack(to_sequences(THREE), RowShape(max_tokens=20))[0]
    moved = replace(row, ref_logp=row.rollout_logp + 1).to(torch.device("meta"))
    assert {k for k, v in vars(moved).items() if isinstance(v, torch.Tensor) and v.is_meta} == {
        "tokens", "positions", "cu_seqlens", "advantage", "loss_weight", "rollout_logp", "ref_logp"
    }  # fmt: skip
    assert (moved.max_seqlen, moved.old_logp) == (6, None)


def of_lengths(*lengths: int) -> list[Sequence]:
    return [Sequence([length] * length, 1, 1.0) for length in lengths]


def lengths_of(rows: list[PackedBatch]) -> list[list[int]]:
    return [row.cu_seqlens.diff().tolist() for row in rows]


def test_best_fit_leaves_no_avoidable_row():
    # First fit puts the 3 beside the 15, where it leaves 1: the last 2 then needs a fourth row.
    assert lengths_of(pack(of_lengths(3, 2, 18, 10, 2, 6, 15), RowShape(max_tokens=19))[0]) == [
        [18],
        [15, 2, 2],
        [10, 6, 3],
    ]


def test_shards_are_dealt_equal_loads():
    # Longest first to the least loaded: 9 | 7, then 5 to the 7, 4 to the 9, 3 to the 12.
    shards = pack(of_lengths(4, 9, 3, 5, 7), RowShape(max_tokens=16, shards=2))
    assert [lengths_of(rows) for rows in shards] == [[[9, 4]], [[7, 5, 3]]]


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_rows_are_padded_to_a_multiple(multiple):
    for row in flat(pack(to_sequences(random_samples(20)), RowShape(max_tokens=24, multiple=multiple))):
        assert len(row.tokens) % multiple == 0
        assert len(row.tokens) <= 24
        assert row.cu_seqlens[-1] == len(row.tokens) == len(row.positions) == len(row.loss_weight)


def test_padding_is_a_sequence_of_its_own_with_weight_zero():
    (row,) = pack(of_lengths(5), RowShape(max_tokens=9, multiple=4))[0]  # a row holds 8
    assert sequences_of(row)[1] == ([0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0])
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row.max_seqlen == 5


def test_a_row_filled_up_is_the_row_with_another_sequence_of_weight_zero():
    (row,) = pack(of_lengths(5), RowShape(max_tokens=5))[0]
    every = {field.name for field in fields(row)} - {"max_seqlen"}
    given = {name: torch.ones(5) for name in ("old_logp", "ref_logp")}
    experts, stale = torch.zeros(5, 2, 1, dtype=torch.int16), torch.ones(5, dtype=torch.bool)
    row = replace(row, experts=experts, stale=stale, **given)
    filled = row.padded(12)
    assert {name: len(getattr(filled, name)) for name in every} == dict.fromkeys(every, 12) | {"cu_seqlens": 3}
    assert filled.stale.tolist() == [True] * 5 + [False] * 7
    assert sequences_of(filled)[:1] == sequences_of(row)
    assert sequences_of(filled)[1] == ([0] * 7, [0] * 7, [0] * 7, [0] * 7)
    assert filled.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert (filled.max_seqlen, filled.old_logp.sum(), filled.experts[5:].unique().tolist()) == (7, 5, [-1])
    assert row.padded(5) is row


@pytest.mark.parametrize("multiple", [1, 4])
def test_every_shard_has_as_many_rows_as_the_fullest(multiple):
    shards = pack(of_lengths(8, 8, 8, 8, 8), RowShape(max_tokens=8, shards=3, multiple=multiple))
    assert [len(rows) for rows in shards] == [2, 2, 2]
    assert lengths_of(shards[2]) == [[8], [multiple]]
    dummy = shards[2][1]
    assert (dummy.tokens.tolist(), dummy.loss_weight.tolist()) == ([0] * multiple, [0.0] * multiple)


def test_no_sequences_give_each_shard_one_dummy_row():
    shards = pack(to_sequences([]), RowShape(max_tokens=8, shards=2, multiple=2))
    assert [[row.loss_weight.tolist() for row in rows] for rows in shards] == [[[0.0, 0.0]]] * 2


def test_packing_is_the_same_every_time():
    first, second = (
        [sequences_of(row) for row in flat(pack(to_sequences(random_samples(20)), RowShape(max_tokens=24, shards=2)))]
        for _ in range(2)
    )
    assert first == second


def test_a_sequence_that_does_not_fit_is_refused():
    with pytest.raises(ValueError) as caught:
        pack(to_sequences([sample([1, 2], [3] * 9)]), RowShape(max_tokens=10))
    assert str(caught.value) == "pack: a sequence of 11 tokens does not fit a row of 10"
    with pytest.raises(ValueError) as caught:  # a row is as long as the largest multiple
        pack(to_sequences([sample([1], [3] * 9)]), RowShape(max_tokens=11, multiple=4))
    assert str(caught.value) == "pack: a sequence of 10 tokens does not fit a row of 8"
    assert len(pack(to_sequences([sample([1], [3] * 9)]), RowShape(max_tokens=10))[0]) == 1


@pytest.mark.parametrize("shards", [1, 3])
def test_a_unit_is_never_split_over_rows_or_shards(shards):
    draw = random.Random(2)
    units = [
        [Sequence([i] * draw.randint(1, 9), 0, 1.0), Sequence([i] * draw.randint(1, 9), 0, 0.5)] for i in range(40)
    ]
    rows = flat(pack_units(units, RowShape(max_tokens=24, shards=shards, multiple=4)))
    found = []
    for row in rows:
        whole = [(tokens, weight[0]) for tokens, weight, *_ in sequences_of(row) if weight[0]]
        assert len(whole) % 2 == 0
        found += [whole[i : i + 2] for i in range(0, len(whole), 2)]
    wanted = [[(sequence.tokens, sequence.weight) for sequence in unit] for unit in units]
    assert sorted(found) == sorted(wanted)
    with pytest.raises(ValueError, match="2 sequences that stay together, of 26 tokens does not fit a row of 24"):
        pack_units([[Sequence([0] * 13, 0, 1.0)] * 2], RowShape(max_tokens=27, multiple=4))


def test_a_rank_makes_its_own_rows_only(monkeypatch):
    made, row = [], batch._row
    monkeypatch.setattr(batch, "_row", lambda items, multiple: made.append(items) or row(items, multiple))
    shards = pack(of_lengths(4, 9, 3, 5, 7), RowShape(max_tokens=16, shards=3, multiple=4))
    assert len(shards) == 3 and not made
    rows = shards[1]
    assert len(made) == len(rows) > 0
    assert shards.row_lengths() == [[len(row.tokens) for row in rows] for rows in shards]
    assert shards.row_lengths()[1] == [len(row.tokens) for row in rows]
    assert pack([], RowShape(max_tokens=16, shards=2, multiple=4)).row_lengths() == [[4], [4]]
