"""How good the scores of a reward model are on held-out pairs and labels. Pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from r1engine.evaluation.statistics import wilson

BINS = 10  # of the calibration
BARS = 24  # of a histogram


def measures(scores: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Key of the log -> value; what is not known is not in it.

    Args:
        scores:  [N, 2] of the chosen and the rejected text of pairs, or [N, 1].
        lengths: the same shape, tokens of the texts.
        labels:  [N] 1 (safe) or 0, of what is no pair.
    """
    right = outcomes(scores, labels)
    found: dict[str, float | None] = dict(accuracy(right))
    found |= {"score_mean": float(scores.mean()), "score_std": float(scores.std())}
    found["calibration_error"] = calibration(confidence(scores), right)[0]
    found["length_correlation"] = correlation(scores.ravel(), lengths.ravel().astype(float))
    if labels is None:
        found["difference"] = float((scores[:, 0] - scores[:, 1]).mean())
    else:
        found["auc"] = area_under_curve(scores[:, 0], labels > 0)
    return {name: value for name, value in found.items() if value is not None}


def outcomes(scores: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """[N] 1 where the score says what is so, 0 where not, a tie 0.5."""
    sign = scores[:, 0] - scores[:, 1] if labels is None else scores[:, 0] * (2 * labels - 1)
    return (np.sign(sign) + 1) / 2


def confidence(scores: np.ndarray) -> np.ndarray:
    """[N] the probability that the model gives to what it says: of the better text, or of the label. At least 0.5."""
    size = np.abs(scores[:, 0] - scores[:, 1] if scores.shape[1] == 2 else scores[:, 0])
    return 1 / (1 + np.exp(-size))


def accuracy(right: np.ndarray) -> dict[str, float]:
    """The share of [N] outcomes, with Wilson's 95 % interval."""
    share = float(right.mean())
    low, high = wilson(share, len(right))
    return {"accuracy": share, "accuracy_low": low, "accuracy_high": high}


def calibration(probability: np.ndarray, right: np.ndarray) -> tuple[float, list[list[float]]]:
    """The expected calibration error (arXiv 1706.04599), and of each bin: mean probability, share right, count.

    Args:
        probability: [N] in [0.5, 1], that the model gives to what it says.
        right:       [N] whether it is so.
    """
    place = np.minimum(((probability - 0.5) * 2 * BINS).astype(int), BINS - 1)
    inside = [place == number for number in range(BINS)]
    bins = [[float(probability[i].mean()), float(right[i].mean()), float(i.sum())] for i in inside if i.any()]
    return sum(count * abs(p - share) for p, share, count in bins) / len(right), bins


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else None


def area_under_curve(scores: np.ndarray, is_positive: np.ndarray) -> float | None:
    """The probability that a positive scores above a negative, a tie 0.5; None where one kind is missing."""
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    if not positives or not negatives:
        return None
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1; equal scores share the mean of theirs
    return float((rank[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def shown(scores: np.ndarray, lengths: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """What a report draws: histograms of the two kinds of texts, score against length, calibration. JSON values.

    Args and shapes: as of `measures`.
    """
    kinds = (
        {"chosen": scores[:, 0], "rejected": scores[:, 1]}
        if labels is None
        else {"safe": scores[labels > 0, 0], "unsafe": scores[labels == 0, 0]}
    )
    edges = np.histogram_bin_edges(scores, BARS)
    some = np.linspace(0, scores.size - 1, min(scores.size, 2000)).astype(int)
    return {
        "edges": edges.round(5).tolist(),
        "counts": {name: np.histogram(values, edges)[0].tolist() for name, values in kinds.items()},
        "lengths": lengths.ravel()[some].tolist(),
        "scores": scores.ravel()[some].round(5).tolist(),
        "calibration": calibration(confidence(scores), outcomes(scores, labels))[1],
    }
