"""Statistics of an evaluation, against values computed by hand or taken from tables."""

from __future__ import annotations

import math

import pytest

from r1engine.evaluation.elo import ContestRow, expected_rank, percentile, rank_of, rating_of_rank
from r1engine.evaluation.statistics import (
    compare,
    error_with,
    estimate,
    holm,
    mcnemar,
    pass_at_k,
    t_cdf,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706205), (2, 4.302653), (3, 3.182446), (29, 2.045230)])
def test_student_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-6)
    assert t_cdf(quantile, degrees) == pytest.approx(0.975, abs=1e-7)
    assert t_cdf(-quantile, degrees) == pytest.approx(0.025, abs=1e-7)


def test_with_many_degrees_student_is_normal():
    assert t_quantile(0.975, 10**6) == pytest.approx(1.959966, abs=1e-5)
    assert t_cdf(0.0, 5) == 0.5


@pytest.mark.parametrize(
    ("share", "n", "interval"),
    [(0.5, 30, (0.331541, 0.668459)), (1.0, 30, (0.886487, 1.0)), (0.0, 30, (0.0, 0.113513))],
)
def test_wilson_by_hand(share, n, interval):
    assert wilson(share, n) == pytest.approx(interval, abs=1e-6)


def test_the_error_is_over_questions_not_samples():
    found = estimate([1.0, 0.5, 0.0])
    assert (found.mean, found.standard_error) == (0.5, pytest.approx(0.288675, abs=1e-6))
    assert (found.low, found.high) == (0.0, 1.0)  # 4.30 errors either way, cut
    as_if_alone = [1.0] * 4 + [1.0, 1.0, 0.0, 0.0] + [0.0] * 4  # four samples of each, taken for questions
    assert estimate(as_if_alone).standard_error == pytest.approx(0.150756, abs=1e-6)


def test_questions_of_one_text_are_one_cluster():
    scores, clusters = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b", "c", "c"]
    assert estimate(scores, clusters=clusters).standard_error == pytest.approx(0.288675, abs=1e-6)
    assert estimate(scores).standard_error == pytest.approx(0.223607, abs=1e-6)


def test_a_perfect_score_has_an_interval():
    found = estimate([1.0] * 30)
    assert (found.mean, found.low, found.high) == (1.0, pytest.approx(0.886487, abs=1e-6), 1.0)
    assert estimate([0.25]).low < 0.25 < estimate([0.25]).high  # a single question
    with pytest.raises(ValueError, match="no scores"):
        estimate([])


@pytest.mark.parametrize(
    ("samples", "error"), [(1, 0.395285), (4, 0.25), (16, 0.197642), (64, 0.182217), (math.inf, 0.176777)]
)
def test_what_more_samples_would_give(samples, error):
    assert error_with(samples, [0.75, 0.25], drawn=4) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("samples", "right", "k", "chance"),
    [
        (5, 2, 1, 0.4),
        (5, 2, 2, 0.7),
        (5, 2, 3, 0.9),
        (5, 2, 4, 1.0),
        (64, 16, 1, 0.25),
        (64, 16, 4, 0.693756),
        (64, 1, 16, 0.25),
        (16, 0, 4, 0.0),
    ],
)
def test_pass_at_k_by_hand(samples, right, k, chance):
    assert pass_at_k(samples, right, k) == pytest.approx(chance, abs=1e-6)


def test_more_than_all_samples_cannot_be_drawn():
    with pytest.raises(ValueError, match="found k = 6, required 1 to the 5 samples"):
        pass_at_k(5, 2, 6)


def test_paired_scores_are_compared_question_by_question():
    found = compare([1.0, 0.5, 0.75, 0.0], [0.5, 0.5, 0.25, 0.0])
    assert (found.mean, found.standard_error) == (0.25, pytest.approx(0.144338, abs=1e-6))
    assert math.hypot(*(estimate(s).standard_error for s in ([1.0, 0.5, 0.75, 0.0], [0.5, 0.5, 0.25, 0.0]))) == (
        pytest.approx(0.244736, abs=1e-6)  # as if the questions were not the same
    )
    assert (found.t, found.p) == (pytest.approx(1.732051, abs=1e-6), pytest.approx(0.181690, abs=1e-6))
    assert (found.low, found.high) == (pytest.approx(-0.209347, abs=1e-6), pytest.approx(0.709347, abs=1e-6))
    assert compare([1.0, 1.0], [1.0, 1.0]).p == 1.0
    with pytest.raises(ValueError, match="found 3 and 2 questions"):
        compare([1.0] * 3, [1.0] * 2)


@pytest.mark.parametrize(("first", "second", "p"), [(10, 2, 0.038574), (1, 0, 1.0), (5, 0, 0.0625), (0, 0, 1.0)])
def test_mcnemar_by_hand(first, second, p):
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(p, abs=1e-6)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


THREE = [1500.0] * 3


@pytest.mark.parametrize(
    ("ratings", "rank", "rating"),
    [
        (THREE, 2, 1500 + 400 * math.log10(2)),
        (THREE, 3, 1379.59),
        ([1500.0] * 100, 51, 1500.0),
        ([1500.0] * 1000, 2, 2699.83),
        ([1200.0, 1600.0, 2000.0], 2, 1813.53),
        ([1200.0, 1600.0, 2000.0], 3, 1386.47),
        (THREE, 1, 1900.0),  # nobody is expected to come first
        (THREE, 4, 0.0),
    ],
)
def test_rating_of_a_rank_by_hand(ratings, rank, rating):
    assert rating_of_rank(rank, ratings) == pytest.approx(rating, abs=0.01)


def test_expected_rank_by_hand():
    ratings = [1200.0, 1600.0, 2000.0]
    found = [expected_rank(rating, ratings) for rating in (1400, 1600, 1800)]
    assert found == pytest.approx([2.969347, 2.5, 2.030653], abs=1e-6)


def test_rank_counts_who_is_ahead_and_shares_a_tie():
    rows = [ContestRow(1500, 3, 10), ContestRow(1500, 2, 10), ContestRow(1500, 2, 30), ContestRow(1500, 0)]
    assert rank_of(4, 0, rows) == 1
    assert rank_of(2, 20, rows) == 3
    assert rank_of(2, 30, rows) == 3.5
    assert percentile(1600, [1200, 1500, 1600, 1700]) == 0.5
