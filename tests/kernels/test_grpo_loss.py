"""grpo_loss against eq. 1 and 2 written out in plain Python, and against numbers worked out by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from r1kernels import GrpoObjective, grpo_loss

NAN, INF = float("nan"), float("inf")


# ---- eq. 1 and 2, from the paper, one sequence and one token at a time ------------------------------------------


@dataclass(frozen=True)
class Row:
    logp: list[float]
    old_logp: list[float]
    ref_logp: list[float]
    advantage: list[float]
    loss_weight: list[float]
    cu_seqlens: list[int]


def unit_loss(
    logp: float, old: float, ref: float, advantage: float, *, low: float, high: float, kl_coef: float
) -> float:
    """-( min(ratio A, clip(ratio, 1 - low, 1 + high) A) - beta KL ) of one token or one sequence."""
    ratio = math.exp(logp) / math.exp(old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    ref_ratio = math.exp(ref) / math.exp(logp)
    kl = ref_ratio - math.log(ref_ratio) - 1
    return -(min(ratio * advantage, clipped * advantage) - kl_coef * kl)


def eq1(row: Row, level: str, *, low: float, high: float, kl_coef: float) -> float:
    """The weighted sum over the row's tokens; at sequence level a unit is the sum of a sequence's weighted tokens."""
    total = 0.0
    for start, end in pairwise(row.cu_seqlens):
        used = [t for t in range(start, end) if row.loss_weight[t] != 0]
        units = [[t] for t in used] if level == "token" else [used] * bool(used)
        for unit in units:
            logp, old, ref = (sum(x[t] for t in unit) for x in (row.logp, row.old_logp, row.ref_logp))
            weight = sum(row.loss_weight[t] for t in unit)
            advantage = row.advantage[unit[0]]
            total += weight * unit_loss(logp, old, ref, advantage, low=low, high=high, kl_coef=kl_coef)
    return total


def slope(function: Callable[[Row], float], row: Row, t: int, h: float = 1e-5) -> float:
    """Central difference of a function of the row in logp[t]."""

    def at(value: float) -> float:
        return function(replace(row, logp=[*row.logp[:t], value, *row.logp[t + 1 :]]))

    return (at(row.logp[t] + h) - at(row.logp[t] - h)) / (2 * h)


def random_row(seed: int) -> Row:
    """Sequences of 1 to 9 tokens, prompts of weight 0 in front, one advantage and one weight a sequence."""
    draw = random.Random(seed)
    logp, advantage, weight, cu = [], [], [], [0]
    for _ in range(4):
        prompt, answer = draw.randint(0, 3), draw.randint(1, 6)
        logp += [draw.uniform(-3, 0) for _ in range(prompt + answer)]
        advantage += [draw.gauss(0, 1)] * (prompt + answer)
        weight += [0.0] * prompt + [1 / (4 * answer)] * answer
        cu.append(len(logp))
    old, ref = ([x + draw.gauss(0, 0.3) for x in logp] for _ in range(2))
    return Row(logp, old, ref, advantage, weight, cu)


def run(row: Row, level: str = "token", dtype: torch.dtype = torch.float64, **options: object):
    """(loss, d loss / d logp, metrics) of the op."""
    logp, old, ref, advantage, weight = (
        torch.tensor(x, dtype=dtype) for x in (row.logp, row.old_logp, row.ref_logp, row.advantage, row.loss_weight)
    )
    logp.requires_grad_()
    cu = torch.tensor(row.cu_seqlens, dtype=torch.int32)
    objective = GrpoObjective(ratio_level=level, **options)
    loss, metrics = grpo_loss(logp, old, advantage, weight, objective, ref_logp=ref, cu_seqlens=cu)
    loss.backward()
    return loss.item(), logp.grad.tolist(), metrics


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("low", "high", "kl_coef"), [(10.0, 10.0, 0.001), (0.2, 0.2, 0.5), (0.1, 0.3, 0.0)])
def test_values_and_gradients_match_the_equations(seed, level, low, high, kl_coef):
    row = random_row(seed)

    def wanted(x: Row) -> float:
        return eq1(x, level, low=low, high=high, kl_coef=kl_coef)

    options = {"clip_eps": low, "clip_eps_high": high, "kl_coef": kl_coef}
    loss, grad, _ = run(row, level, **options)
    assert loss == pytest.approx(wanted(row), rel=1e-12, abs=1e-12)
    assert grad == pytest.approx([slope(wanted, row, t) for t in range(len(row.logp))], rel=1e-6, abs=1e-8)

    loss32, grad32, _ = run(row, level, torch.float32, **options)
    assert loss32 == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert grad32 == pytest.approx(grad, rel=1e-5, abs=1e-5)


def test_clip_eps_holds_above_too_unless_told_otherwise():
    row = random_row(0)
    assert run(row, clip_eps=0.1)[:2] == run(row, clip_eps=0.1, clip_eps_high=0.1)[:2]
    assert run(row, clip_eps=0.1)[0] != run(row, clip_eps=0.1, clip_eps_high=0.4)[0]


# ---- one token, by hand ----------------------------------------------------------------------------------------


def token(ratio: float, advantage: float, *, ref_ratio: float = 1.0, **options: object) -> tuple[float, float, float]:
    """(loss, gradient, clip fraction) of one token of weight 1, with ratio = pi/pi_old and ref_ratio = pi_ref/pi."""
    row = Row([-1.0], [-1.0 - math.log(ratio)], [-1.0 + math.log(ref_ratio)], [advantage], [1.0], [0, 1])
    loss, grad, metrics = run(row, **options)
    return loss, grad[0], metrics.clip_fraction.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_cut"),
    [
        (1.19, 1.0, -1.19, -1.19, 0),
        (1.21, 1.0, -1.2, 0.0, 1),  # a positive advantage stops at the upper clip
        (2.0, 3.0, -3.6, 0.0, 1),
        (0.5, 1.0, -0.5, -0.5, 0),  # but is free below
        (0.81, -1.0, 0.81, 0.81, 0),
        (0.79, -1.0, 0.8, 0.0, 1),  # a negative one stops at the lower
        (2.0, -1.0, 2.0, 2.0, 0),  # but is free above
        (2.0, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, gradient, is_cut):
    assert token(ratio, advantage, clip_eps=0.2) == pytest.approx((loss, gradient, is_cut), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "loss", "gradient", "is_cut"),
    [(10.9, -10.9, -10.9, 0), (11.1, -11.0, 0.0, 1), (0.001, -0.001, -0.001, 0)],
)
def test_the_papers_clip_ratio_of_10_stops_at_11(ratio, loss, gradient, is_cut):
    assert token(ratio, 1.0) == pytest.approx((loss, gradient, is_cut), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_cut"),
    [
        (2.9, -1.0, 2.9, 2.9, 0),
        (3.1, -1.0, 3.0, 0.0, 1),  # the loss of a negative advantage is at most 3 |A|
        (5.0, -2.0, 6.0, 0.0, 1),
        (0.5, -1.0, 0.8, 0.0, 1),  # the lower clip still holds
        (5.0, 1.0, -1.2, 0.0, 1),  # and positive advantages are as before
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, gradient, is_cut):
    assert token(ratio, advantage, clip_eps=0.2, dual_clip=3.0) == pytest.approx((loss, gradient, is_cut), abs=1e-12)


@pytest.mark.parametrize("ref_ratio", [1.0, 0.5, 3.0])
def test_k3_by_hand(ref_ratio):
    # kl = r - log r - 1 with r = pi_ref / pi, so d kl / d logp = 1 - r: a policy above the reference is pulled down.
    loss, gradient, _ = token(1.0, 0.0, ref_ratio=ref_ratio, kl_coef=0.25)
    assert loss == pytest.approx(0.25 * (ref_ratio - math.log(ref_ratio) - 1), abs=1e-12)
    assert gradient == pytest.approx(0.25 * (1 - ref_ratio), abs=1e-12)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    row = random_row(1)
    _, grad, metrics = run(replace(row, old_logp=row.logp), clip_eps=0.2)
    assert grad == pytest.approx([-w * a for w, a in zip(row.loss_weight, row.advantage, strict=True)], abs=1e-12)
    assert (metrics.ratio.item(), metrics.clip_fraction.item()) == pytest.approx((1.0, 0.0))


def test_sequence_level_by_hand():
    # Sequence 1: ratio 1.5 * 0.6 = 0.9 inside the clip, though both tokens are outside. Sequence 2: 1.1 * 1.2 = 1.32.
    ratios = [1.5, 0.6, 1.1, 1.2]
    row = Row([-1.0] * 4, [-1 - math.log(r) for r in ratios], [-1.0] * 4, [1.0] * 4, [0.25] * 4, [0, 2, 4])
    loss, grad, metrics = run(row, "sequence", clip_eps=0.2)
    assert loss == pytest.approx(-(0.9 + 1.2) / 2)
    assert grad == pytest.approx([-0.45, -0.45, 0.0, 0.0])
    assert metrics.clip_fraction.item() == pytest.approx(0.5)
    assert metrics.ratio.item() == pytest.approx((0.9 + 1.32) / 2)


# ---- what must do no harm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_positions_of_weight_zero_may_hold_anything(bad, level):
    row = random_row(2)
    unused = [w == 0 for w in row.loss_weight]
    assert any(unused)

    def spoil(values: list[float]) -> list[float]:
        return [bad if u else x for u, x in zip(unused, values, strict=True)]

    options = {"clip_eps": 0.2, "kl_coef": 0.5, "dual_clip": 3.0}
    clean_loss, clean_grad, clean_metrics = run(row, level, **options)
    for names in (["logp"], ["old_logp"], ["ref_logp"], ["advantage"], ["logp", "old_logp", "ref_logp", "advantage"]):
        loss, grad, metrics = run(replace(row, **{n: spoil(getattr(row, n)) for n in names}), level, **options)
        assert (loss, grad, metrics) == (clean_loss, clean_grad, clean_metrics), names
    assert all(g == 0 for g, u in zip(clean_grad, unused, strict=True) if u)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_row_without_weights_has_loss_zero_and_gradient_zero(level):
    row = random_row(3)
    n = len(row.logp)
    loss, grad, metrics = run(replace(row, loss_weight=[0.0] * n, logp=[NAN] * n), level, kl_coef=0.5)
    assert loss == 0
    assert grad == [0.0] * n
    assert [x.item() for x in metrics] == [0] * 7


@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_ratio_beyond_the_floats_makes_no_nan(level, dual_clip, advantage):
    # Two tokens of 400 nats: exp(400) is infinite in float32, exp(800) in float64 as well.
    row = Row([-1.0, -1.0], [-401.0, -401.0], [-1.0, -1.0], [advantage] * 2, [0.5, 0.5], [0, 2])
    for dtype in (torch.float32, torch.float64):
        loss, grad, metrics = run(row, level, dtype, clip_eps=0.2, dual_clip=dual_clip, kl_coef=0.1)
        bound = 1.2 if advantage >= 0 else dual_clip or math.exp(20.0)
        assert loss == pytest.approx(-bound * advantage, rel=1e-5)
        assert grad == [0.0, 0.0]
        assert metrics.clip_fraction.item() == (advantage > 0 or (advantage < 0 and dual_clip is not None))


def test_a_reference_far_away_makes_no_nan():
    row = Row([-401.0], [-401.0], [-1.0], [1.0], [1.0], [0, 1])
    loss, grad, metrics = run(row, kl_coef=0.1)
    assert metrics.kl.item() == pytest.approx(math.exp(20) - 21)
    assert (loss, grad) == (pytest.approx(-1 + 0.1 * (math.exp(20) - 21)), [-1.0])


def test_a_kl_term_of_weight_zero_is_reported_but_adds_nothing():
    row = random_row(4)
    loss, grad, metrics = run(row, kl_coef=0.0)
    assert metrics.kl.item() > 0
    logp = torch.tensor(row.logp, dtype=torch.float64, requires_grad=True)
    old, advantage, weight = (
        torch.tensor(x, dtype=torch.float64) for x in (row.old_logp, row.advantage, row.loss_weight)
    )
    without, found = grpo_loss(logp, old, advantage, weight)
    without.backward()
    assert (without.item(), logp.grad.tolist()) == (loss, grad)
    assert found.kl.item() == 0


def test_metrics_are_weighted_means():
    row = random_row(5)
    _, _, metrics = run(row, clip_eps=0.2, kl_coef=0.5)
    kl = ratio = cut = 0.0
    for logp, old, ref, a, w in zip(row.logp, row.old_logp, row.ref_logp, row.advantage, row.loss_weight, strict=True):
        r = math.exp(logp - old)
        kl += w * (math.exp(ref - logp) - (ref - logp) - 1)
        ratio += w * r
        cut += w * ((a > 0 and r > 1.2) or (a < 0 and r < 0.8))
    assert 0 < cut < 1
    assert [metrics.kl.item(), metrics.clip_fraction.item(), metrics.ratio.item()] == pytest.approx([kl, cut, ratio])
    assert not any(x.requires_grad for x in metrics)


# ---- messages --------------------------------------------------------------------------------------------------

FOUR = torch.zeros(4)
GSPO = GrpoObjective(ratio_level="sequence_mean")


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((FOUR.long(), FOUR, FOUR, FOUR), {}, "logp must be floating point, got torch.int64"),
        ((FOUR, FOUR, FOUR, FOUR.bool()), {}, "loss_weight must be floating point, got torch.bool"),
        ((FOUR[None],) * 4, {}, "logp must be [T], got (1, 4)"),
        ((FOUR, FOUR[:3], FOUR, FOUR), {}, "old_logp is (3,) on cpu, but logp is (4,) on cpu"),
        ((FOUR, FOUR, FOUR[:3], FOUR), {}, "advantage is (3,) on cpu, but logp is (4,) on cpu"),
        ((FOUR, FOUR, FOUR, FOUR.to("meta")), {}, "loss_weight is (4,) on meta, but logp is (4,) on cpu"),
        ((FOUR,) * 4, {"ref_logp": FOUR[:1]}, "ref_logp is (1,) on cpu, but logp is (4,) on cpu"),
        ((FOUR,) * 4, {"objective": GrpoObjective(kl_coef=0.1)}, "kl_coef=0.1 needs ref_logp, got None"),
        ((FOUR,) * 4, {"objective": GrpoObjective(entropy_coef=0.1)}, "entropy_coef=0.1 needs entropy, got None"),
        ((FOUR,) * 4, {"objective": GrpoObjective(tis="mask")}, "tis='mask' needs rollout_logp, got None"),
        (
            (FOUR,) * 4,
            {"objective": GSPO},
            "ratio_level or tis_level of sequences needs cu_seqlens, got None",
        ),
        (
            (FOUR,) * 4,
            {"objective": GSPO, "cu_seqlens": torch.tensor([0.0, 4.0])},
            "cu_seqlens must be [S+1] int32 or int64 on cpu, got torch.float32 (2,) on cpu",
        ),
        (
            (FOUR,) * 4,
            {"objective": GSPO, "cu_seqlens": torch.tensor([0, 3])},
            "cu_seqlens must rise from 0 to 4, got [0, 3]",
        ),
        ((FOUR,) * 4, {"impl": "cuda"}, "impl='cuda' does not exist; this op has triton, reference"),
    ],
)
def test_error(tensors, options, message):
    with pytest.raises(ValueError) as caught:
        grpo_loss(*tensors, **options)
    assert str(caught.value) == f"grpo_loss: {message}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "loss must be one of clip, cispo, sapo, got 'ppo'"),
        ({"ratio_level": "word"}, "ratio_level must be one of token, sequence, sequence_mean, got 'word'"),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3, abs, got 'k4'"),
        ({"kl_grad": "k4"}, "kl_grad must be one of k1, k2, k3, abs, None, got 'k4'"),
        ({"tis": "icepop"}, "tis must be one of off, truncate, mask, got 'icepop'"),
        ({"clip_eps": 0.0}, "clip_eps must be > 0, got 0.0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1, got 1.0"),
        ({"sapo_tau": -1.0}, "sapo_tau must be > 0, got -1.0"),
        ({"kl_coef": NAN}, "kl_coef must be finite, got nan"),
        ({"tis_low": 3.0}, "tis_low must be in [0, tis_high=2.0], got 3.0"),
        (
            {"kl_importance": True, "ratio_level": "sequence"},
            "kl_importance needs ratio_level='token', got 'sequence'",
        ),
    ],
)
def test_an_objective_that_makes_no_sense(options, message):
    with pytest.raises(ValueError) as caught:
        GrpoObjective(**options)
    assert str(caught.value) == f"GrpoObjective: {message}"
