"""The pure functions around eq. 1-3: rewards, advantages, mini-batches, learning rate, objective."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Context, localcontext
from fractions import Fraction

import pytest
import torch

from r1engine.batch import Completion, PackedBatch, Prompt, RowShape, Sample, TokenOutputs, pack, to_sequences
from r1engine.config import Grpo, Optimizer, Rewards
from r1engine.data.question import Question
from r1engine.grpo import objective, split_minibatches, to_samples, total_rewards
from r1engine.rewards import Score

HALF = math.sqrt(0.5)  # advantage of the better of two


def completion(prompt: int = 0, sample: int = 0, truncated: bool = False) -> Completion:
    question = Prompt(id=prompt, tokens=[1, 2], text="", question=Question(""))
    return Completion(question, sample, [3, 4, 5], [-0.5, -1.0, -1.5], "", truncated)


RIGHT = Score("right", {"accuracy": 1.0, "format": 1.0}, "")
UNFORMATTED = Score("right", {"accuracy": 1.0, "format": 0.0}, "")
WRONG = Score("wrong", {"accuracy": 0.0, "format": 1.0}, "")
UNDECIDED = Score("undecided", {"format": 1.0}, "")


# ---- rewards ---------------------------------------------------------------------------------------------------


def total(score: Score, weights: Rewards, cfg: Grpo, *, truncated: bool = False) -> float | None:
    return total_rewards([(completion(truncated=truncated), score)], cfg, weights.weights_at(0))[0]


@pytest.mark.parametrize(
    ("score", "weights", "wanted"),
    [
        (RIGHT, Rewards(), 2.0),
        (WRONG, Rewards(), 1.0),
        (RIGHT, Rewards(accuracy=3.0, format=0.5), 3.5),
        (UNFORMATTED, Rewards(accuracy=3.0, format=0.5), 3.0),
        (WRONG, Rewards(accuracy=3.0, format=0.5), 0.5),
        (RIGHT, Rewards(accuracy=1.0, format=0.0), 1.0),
        # Section 2.3.2 sums accuracy and language consistency.
        (Score("right", {"accuracy": 1.0, "format": 1.0, "language": 0.75}, ""), Rewards(format=0, language=1), 1.75),
        (Score("right", {"accuracy": 1.0, "overlong": -0.5}, ""), Rewards(overlong=2), 0.0),
    ],
)
@pytest.mark.parametrize("truncated", ["zero", "mask"])
def test_the_total_reward_is_the_weighted_sum(score, weights, wanted, truncated):
    assert total(score, weights, Grpo(truncated=truncated)) == wanted


@pytest.mark.parametrize("score", [RIGHT, WRONG, UNDECIDED])
@pytest.mark.parametrize(("truncated", "wanted"), [("zero", 0.0), ("mask", None)])
def test_a_truncated_completion_gets_zero_or_is_left_out(score, truncated, wanted):
    assert total(score, Rewards(), Grpo(truncated=truncated), truncated=True) == wanted


def test_a_truncated_completion_keeps_its_overlong_punishment():
    # Else the limit would be worth more than a wrong answer shortly before it.
    score = Score("wrong", {"accuracy": 0.0, "format": 0.0, "overlong": -1.0}, "")
    assert total(score, Rewards(overlong=0.5), Grpo(truncated="zero"), truncated=True) == -0.5


def test_a_truncated_completion_is_worth_no_more_than_what_a_reward_model_likes_least():
    question = Prompt(0, [1], "", Question("", reward="preference"))
    graded = [
        (Completion(question, i, [3], [-0.5], "", cut), Score("right", {"helpfulness": score}, ""))
        for i, (score, cut) in enumerate([(-3.0, False), (-5.0, False), (2.0, True)])
    ]
    weights = Rewards(helpfulness=0.5).weights_at(0)
    assert total_rewards(graded, Grpo(truncated="zero"), weights) == [-1.5, -2.5, -2.5]
    assert total_rewards(graded, Grpo(truncated="mask"), weights) == [-1.5, -2.5, None]


@pytest.mark.parametrize("truncated", ["zero", "mask"])
def test_undecided_is_no_reward_rather_than_zero(truncated):
    assert total(UNDECIDED, Rewards(), Grpo(truncated=truncated)) is None


def test_a_component_without_a_value_counts_as_the_mean_of_its_group():
    # Thoughts without words have no language: they gain nothing over the others of their question, and lose nothing.
    without = Score("right", {"accuracy": 1.0}, "")
    graded = [
        (completion(0, 0), Score("right", {"accuracy": 1.0, "language": 1.0}, "")),
        (completion(0, 1), Score("right", {"accuracy": 1.0, "language": 0.5}, "")),
        (completion(0, 2), without),
        (completion(0, 3), Score("undecided", {"language": 0.0}, "")),
        (completion(1, 0), without),  # nobody of this question has one
    ]
    weights = Rewards(format=0, language=1)
    assert total_rewards(graded, Grpo(), weights.weights_at(0)) == [2.0, 1.5, 1.75, None, 1.0]


EQUAL_ON_PAPER = [  # weights, and components whose weighted sums are equal
    ({"accuracy": 0.3, "format": 0.1, "language": 0.2}, [(1, 0, 0), (0, 1, 1), (0, 1, 1), (1, 0, 0)]),
    ({"accuracy": 0.0, "format": 0.0, "language": 1.0}, [(1, 1, 0.1), (1, 1, 0.1), (1, 1, 0.1), (1, 1, None)]),
    ({"accuracy": 0.0, "format": 0.0, "language": 0.7}, [(1, 1, 1 / 3)] * 11 + [(1, 1, None)]),
    ({"accuracy": 1.0, "format": 0.0, "language": 1.0}, [(0.3, 0, -0.2), (0.1, 0, 0.0), (0.1, 1, 0)]),
    ({"accuracy": 1.0, "format": 1.0, "language": 1.0}, [(0.3, -0.2, -0.1), (0, 0, 0), (1, 0, -1)]),
    ({"accuracy": 1e-9, "format": 0.7, "language": 0.1}, [(7, 0.1, 0.1), (7, 0, 0.8), (7, 0.05, 0.45)]),
]


@pytest.mark.parametrize("mode", ["mean_std", "mean", "rloo", "batch_std"])
@pytest.mark.parametrize(("weights", "rows"), EQUAL_ON_PAPER)
def test_totals_that_are_equal_on_paper_give_no_advantage(weights, rows, mode):
    scores = [Score("right", {n: v for n, v in zip(weights, row, strict=True) if v is not None}, "") for row in rows]
    graded = [(completion(0, i), score) for i, score in enumerate(scores)]
    others = [(completion(1, i), Score("right", {"format": float(i), "accuracy": float(i)}, "")) for i in range(2)]
    totals = total_rewards([*graded, *others], Grpo(), weights)
    assert len(set(totals[:-2])) == 1
    samples = to_samples([c for c, _ in [*graded, *others]], totals, Grpo(advantage=mode))
    assert [sample.advantage for sample in samples[:-2]] == [0.0] * len(rows)


def test_totals_do_not_depend_on_the_precision_that_a_library_has_set():
    scores = [Score("right", {"language": 1 / 3}, "")] * 11 + [Score("right", {}, "")]
    with localcontext(Context(prec=3)):  # as reasoning-gym does with 12 digits
        totals = total_rewards([(completion(0, i), s) for i, s in enumerate(scores)], Grpo(), {"language": 0.7})
    assert totals == [float(Fraction("0.7") * Fraction("0.3333333333333333"))] * 12


# ---- advantages ------------------------------------------------------------------------------------------------


def test_advantages_are_taken_inside_each_question():
    completions = [completion(prompt, i) for prompt in (7, 3) for i in range(2)]
    samples = to_samples(completions, [2.0, 0.0, 5.0, 9.0], Grpo())
    assert [s.advantage for s in samples] == pytest.approx([HALF, -HALF, -HALF, HALF])
    assert [s.completion for s in samples] == completions
    assert not any(s.is_masked for s in samples)


def test_groups_go_by_question_and_not_by_place():
    completions = [completion(prompt) for prompt in (900, 5, 900, 5)]
    samples = to_samples(completions, [2.0, 5.0, 0.0, 9.0], Grpo())
    assert [s.advantage for s in samples] == pytest.approx([HALF, -HALF, -HALF, HALF])


def test_an_undecided_sample_is_masked_and_left_out_of_the_mean():
    samples = to_samples([completion(sample=i) for i in range(4)], [1.0, None, 1.0, 0.0], Grpo(advantage="mean"))
    assert [s.advantage for s in samples] == pytest.approx([1 / 3, 0.0, 1 / 3, -2 / 3])
    assert [s.is_masked for s in samples] == [False, True, False, False]


def test_the_only_decided_sample_of_a_question_gives_no_signal_but_counts():
    samples = to_samples([completion(), completion()], [1.0, None], Grpo())
    assert [(s.advantage, s.is_masked) for s in samples] == [(0.0, False), (0.0, True)]


def test_nothing_decided_masks_everything():
    samples = to_samples([completion(), completion()], [None, None], Grpo())
    assert [(s.advantage, s.is_masked) for s in samples] == [(0.0, True)] * 2


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [(Grpo(std_ddof=1), HALF), (Grpo(std_ddof=0), 1.0), (Grpo(advantage="mean"), 2.0)],
)
def test_the_config_chooses_the_advantage(cfg, wanted):
    samples = to_samples([completion(), completion()], [4.0, 0.0], cfg)
    assert [s.advantage for s in samples] == pytest.approx([wanted, -wanted])


# ---- mini-batches ----------------------------------------------------------------------------------------------

ROLLOUT = [Sample(completion(prompt, i), 0.0) for prompt in range(6) for i in range(4)]


@pytest.mark.parametrize("count", [1, 2, 3, 24])
def test_minibatches_are_equal_parts_of_the_rollout(count):
    parts = split_minibatches(ROLLOUT, count, seed=0, step=0)
    assert [len(part) for part in parts] == [24 // count] * count
    assert sorted(id(s) for part in parts for s in part) == sorted(id(s) for s in ROLLOUT)


def test_the_split_is_a_function_of_seed_and_step():
    def split(seed: int, step: int) -> list[list[int]]:
        return [[id(s) for s in part] for part in split_minibatches(ROLLOUT, 3, seed=seed, step=step)]

    assert split(0, 0) == split(0, 0)
    different = [split(0, 0), split(1, 0), split(0, 1), split(1, 10), split(11, 0)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_the_split_is_random_and_leaves_the_rollout_as_it_is():
    before = list(ROLLOUT)
    parts = split_minibatches(ROLLOUT, 3, seed=0, step=0)
    assert before == ROLLOUT
    assert [s for part in parts for s in part] != ROLLOUT
    assert len({s.completion.prompt.id for s in parts[0]}) > 2  # in order it would be the first two questions


# ---- learning rate ---------------------------------------------------------------------------------------------


def test_a_constant_rate_needs_no_warmup():
    assert [Optimizer(lr=2.0).lr_at(step, 10) for step in (0, 5, 9)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_rises_in_equal_steps_from_above_zero_to_the_full_rate(schedule):
    cfg = Optimizer(lr=1.0, warmup_steps=4, schedule=schedule)
    assert [cfg.lr_at(step, 100) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_cosine_runs_from_the_end_of_the_warmup_to_its_floor():
    cfg = Optimizer(lr=2.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    assert cfg.lr_at(10, 110) == pytest.approx(2.0)
    assert cfg.lr_at(35, 110) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert cfg.lr_at(60, 110) == pytest.approx(2 * 0.55)
    assert cfg.lr_at(110, 110) == pytest.approx(0.2)
    rates = [cfg.lr_at(step, 110) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_a_run_that_is_all_warmup_has_a_rate():
    cfg = Optimizer(lr=1.0, warmup_steps=4, schedule="cosine")
    assert cfg.lr_at(3, 4) == pytest.approx(0.8)


# ---- objective -------------------------------------------------------------------------------------------------


def packed_row() -> PackedBatch:
    """Prompt of two tokens and three weighted ones, twice: advantages 2 and -1."""
    samples = [Sample(completion(sample=0), 2.0), Sample(completion(sample=1), -1.0)]
    return pack(to_sequences(samples), RowShape(max_tokens=10))[0][0]


LOGP = [0.0, -0.1, -0.2, -0.3, -0.4, 0.0, -0.5, -0.6, -0.7, -0.8]


def test_the_first_forward_pass_stands_for_the_old_policy():
    logp = torch.tensor(LOGP, requires_grad=True)
    loss, metrics = objective(TokenOutputs(logp, torch.zeros(10)), packed_row(), Grpo(kl_coef=0.0, clip_eps=0.2))
    loss.backward()
    # Every ratio is 1, so loss and gradient are those of -sum(weight * A).
    assert loss.item() == pytest.approx(-(2.0 - 1.0) / 2)
    assert logp.grad.tolist() == pytest.approx([0, 0, -1 / 3, -1 / 3, -1 / 3, 0, 0, 1 / 6, 1 / 6, 1 / 6])
    assert metrics["ratio"].item() == pytest.approx(1.0)
    assert metrics["clip_fraction"].item() == 0.0


def test_the_ratio_is_to_the_old_logp_of_the_row():
    row = replace(packed_row(), old_logp=torch.tensor(LOGP) - math.log(1.1))
    outputs = TokenOutputs(torch.tensor(LOGP), torch.zeros(10))
    loss, metrics = objective(outputs, row, Grpo(kl_coef=0.0, clip_eps=0.2))
    assert metrics["ratio"].item() == pytest.approx(1.1)
    assert loss.item() == pytest.approx(-1.1 * 0.5)


@pytest.mark.parametrize(
    ("cfg", "loss"),
    [
        (Grpo(kl_coef=0.0, clip_eps=0.2), -(2 * 1.2 - 5) / 2),  # ratio 5: only the positive advantage is cut
        (Grpo(kl_coef=0.0, clip_eps=0.2, clip_eps_high=0.5), -(2 * 1.5 - 5) / 2),
        (Grpo(kl_coef=0.0, clip_eps=0.2, dual_clip=3.0), -(2 * 1.2 - 3) / 2),
        (Grpo(kl_coef=0.0), -(2 * 5 - 5) / 2),  # the paper's 10 cuts nothing here
        (Grpo(kl_coef=0.0, clip_eps=200.0, ratio_level="sequence"), -(2 * 125 - 125) / 2),  # three tokens: 5^3
        (Grpo(kl_coef=0.1), -(2 * 5 - 5) / 2 + 0.1 * (2 - math.log(2) - 1)),  # pi_ref / pi = 2
        (Grpo(kl_coef=0.1, kl_grad="k2"), -(2 * 5 - 5) / 2 + 0.1 * (2 - math.log(2) - 1)),  # the value stays
        (Grpo(kl_coef=0.0, clip_eps=0.2, ratio_level="sequence_mean"), -(2 * 1.2 - 5) / 2),  # three tokens of 5 each
        (Grpo(kl_coef=0.0, loss="sapo"), -2 * (2 / (1 + math.exp(-4)) - 1.0 / 1.05 / (1 + math.exp(-4.2)))),
        (Grpo(kl_coef=0.0, tis="truncate", tis_high=1.5), -1.5 * (2 * 5 - 5) / 2),  # pi_old / pi_rollout = 2
        (Grpo(kl_coef=0.0, tis="mask", tis_high=1.5), 0.0),
    ],
)
def test_the_config_reaches_the_loss(cfg, loss):
    logp = torch.tensor(LOGP)
    old = logp - math.log(5)
    row = replace(packed_row(), old_logp=old, ref_logp=logp + math.log(2), rollout_logp=old - math.log(2))
    assert objective(TokenOutputs(logp, torch.zeros(10)), row, cfg)[0].item() == pytest.approx(loss, rel=1e-5)


def test_metrics_are_sums_over_the_weighted_tokens():
    logp = torch.tensor(LOGP)
    row = replace(packed_row(), ref_logp=logp + math.log(2))
    entropy = torch.tensor([9.0, 9.0, 1.0, 2.0, 3.0, 9.0, 9.0, 4.0, 5.0, 6.0])
    _, metrics = objective(TokenOutputs(logp, entropy), row, Grpo())
    wanted = {"kl": 1 - math.log(2), "clip_fraction": 0.0, "ratio": 1.0, "entropy": 3.5, "weight": 1.0}
    assert {name: metrics[name].item() for name in wanted} == pytest.approx(wanted, abs=1e-6)
