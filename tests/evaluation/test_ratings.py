"""Measures of a reward model's scores: by hand, and against the definitions."""

from itertools import product

import numpy as np
import pytest

from r1engine.evaluation.ratings import area_under_curve, calibration, confidence, correlation, measures, shown


def test_pairs_by_hand():
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [3.0, -1.0]])
    lengths = np.array([[20, 10], [10, 20], [15, 15], [30, 5]])
    found = measures(scores, lengths, None)
    assert found["accuracy"] == 2.5 / 4 and found["difference"] == 1.0
    assert found["accuracy_low"] < 0.625 < found["accuracy_high"]
    assert found["length_correlation"] == pytest.approx(np.corrcoef(scores.ravel(), lengths.ravel())[0, 1])
    assert "auc" not in found


def test_labels_by_hand():
    scores, labels = np.array([[2.0], [-1.0], [0.5], [0.5]]), np.array([1.0, 0.0, 0.0, 1.0])
    found = measures(scores, np.array([[5], [5], [5], [5]]), labels)
    assert found["accuracy"] == 3 / 4 and "difference" not in found
    assert "length_correlation" not in found  # all lengths are equal: unknown, not 0
    positives, negatives = scores[labels > 0, 0], scores[labels == 0, 0]
    won = [(a > b) + 0.5 * (a == b) for a, b in product(positives, negatives)]
    assert found["auc"] == pytest.approx(np.mean(won))


def test_area_under_curve_is_the_share_of_right_orders_ties_half():
    drawn = np.random.default_rng(0)
    scores, positive = drawn.integers(0, 6, 60).astype(float), drawn.random(60) < 0.4
    won = [(a > b) + 0.5 * (a == b) for a, b in product(scores[positive], scores[~positive])]
    assert area_under_curve(scores, positive) == pytest.approx(np.mean(won))
    assert area_under_curve(scores, np.ones(60, bool)) is None
    assert correlation(np.ones(3), np.arange(3.0)) is None


def test_calibration_of_a_model_that_is_as_sure_as_it_may_be_and_of_one_that_is_too_sure():
    drawn = np.random.default_rng(1)
    difference = drawn.normal(0, 2, 20_000)
    probability = confidence(np.stack([difference, np.zeros_like(difference)], axis=1))
    right = (drawn.random(20_000) < probability).astype(float)
    error, bins = calibration(probability, right)
    assert error < 0.02 and sum(count for *_, count in bins) == 20_000
    assert calibration(np.full(10, 0.95), np.array([1.0] * 5 + [0.0] * 5))[0] == pytest.approx(0.45)


def test_what_a_report_draws_counts_every_text():
    scores, lengths = np.random.default_rng(2).normal(size=(3000, 2)), np.ones((3000, 2), int)
    found = shown(scores, lengths, None)
    assert {name: sum(counts) for name, counts in found["counts"].items()} == {"chosen": 3000, "rejected": 3000}
    assert len(found["scores"]) == len(found["lengths"]) == 2000
    labels = np.arange(3000) % 3 == 0
    found = shown(scores[:, :1], lengths[:, :1], labels.astype(float))
    assert {name: sum(counts) for name, counts in found["counts"].items()} == {"safe": 1000, "unsafe": 2000}
