"""How good the scores of steps are: ProcessBench's F1, accuracy, calibration. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r1engine.evaluation.ratings import accuracy, area_under_curve, calibration

Labels = Sequence[float | None]  # of the steps of a solution, in [0, 1]; None: unknown


def first_error(values: Labels, threshold: float = 0.5) -> int | None:
    """Index of the first value below `threshold`, -1 if there is none, None where one before it is unknown."""
    for index, value in enumerate(values):
        if value is None:
            return None
        if value < threshold:
            return index
    return -1


def process_bench(found: Sequence[int], wanted: Sequence[int]) -> dict[str, float]:
    """ProcessBench (arXiv 2412.06559): accuracy on solutions with and without an error, and their harmonic mean F1.

    Args:
        found:  index of the first step that is called wrong, -1: none is.
        wanted: the same in truth.

    Returns:
        f1, error_accuracy, correct_accuracy; without those that need a kind of solution that is not there.
    """
    same, is_wrong = np.array(found) == np.array(wanted), np.array(wanted) >= 0
    shares = {
        name: float(same[kind].mean())
        for name, kind in (("error_accuracy", is_wrong), ("correct_accuracy", ~is_wrong))
        if kind.any()
    }
    if len(shares) == 2:
        a, b = shares.values()
        shares["f1"] = 2 * a * b / (a + b) if a + b else 0.0
    return shares


def step_measures(scores: Sequence[Sequence[float]], labels: Sequence[Labels]) -> dict[str, float]:
    """Key of the log -> value; what is not known is not in it.

    A step is right if its label is at least 0.5, and called so if its score is. F1 is of the solutions whose labels are
    known up to the first error.

    Args:
        scores: of each solution the probability of each step.
        labels: the same shape.
    """
    pairs = [(s, y) for a, b in zip(scores, labels, strict=True) for s, y in zip(a, b, strict=True) if y is not None]
    p, y = np.array(pairs, np.float64).reshape(-1, 2).T
    found: dict[str, float | None] = {}
    if len(p):
        is_right = y >= 0.5
        outcome = np.where(p == 0.5, 0.5, (p > 0.5) == is_right)
        found |= accuracy(outcome)
        found["auc"] = area_under_curve(p, is_right)
        found["calibration_error"] = calibration(np.maximum(p, 1 - p), outcome)[0]
        found["rmse"] = float(np.sqrt(((p - y) ** 2).mean()))
        found["share_right"] = float(is_right.mean())
        for name, kind in (("score_right", is_right), ("score_wrong", ~is_right)):
            found[name] = float(p[kind].mean()) if kind.any() else None
    errors = [(first_error(s), first_error(y)) for s, y in zip(scores, labels, strict=True)]
    whole = [(a, b) for a, b in errors if a is not None and b is not None]
    if whole:
        found |= process_bench([a for a, _ in whole], [b for _, b in whole])
    return {name: value for name, value in found.items() if value is not None}
