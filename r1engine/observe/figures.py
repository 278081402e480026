"""The figures of the report: titles, units and lines; charts.py draws them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, cycle

Row = dict[str, float]


@dataclass(frozen=True)
class Series:
    """One line of a figure."""

    key: str  # of metrics.jsonl
    name: str
    color: str
    is_rare: bool = False  # few points, each drawn as a marker and never smoothed


@dataclass(frozen=True)
class Figure:
    """One figure: a title, the unit of its y axis and its lines."""

    title: str
    y_label: str
    series: tuple[Series, ...]
    is_fraction: bool = False  # y axis from 0 to 1
    is_log: bool = False
    over_tokens: bool = False  # x axis: tokens trained on so far, not optimizer steps


@dataclass(frozen=True)
class Lengths:
    """How many texts of supervised training have how many tokens."""

    edges: list[float]  # tokens; one more than there are counts
    texts: list[int]
    row_tokens: int  # of a packed row


LENGTHS_TITLE = "Lengths of the texts"
BLUE, ORANGE, GREEN, GREY, RED = "#2f6fb5", "#d9731a", "#2a8c5a", "#8a94a3", "#c23b4b"
# Of every kind of training.
GRADIENT_NORM = Figure(
    "Gradient norm before clipping", "norm", (Series("grad_norm", "all parameters", BLUE),), is_log=True
)
LEARNING_RATE = Figure("Learning rate", "learning rate", (Series("lr", "learning rate", BLUE),))
SPEED = Figure("Speed", "tokens per second", (Series("tokens_per_second", "all ranks", BLUE),))
RL_FIGURES = (
    Figure(
        "Figure 2 of the paper: accuracy during training",
        "accuracy",
        (
            Series("reward/accuracy", "training questions (accuracy reward)", BLUE),
            Series("eval/pass_at_1", "held-out questions (pass@1)", ORANGE, is_rare=True),
            Series("eval/cons_at_k", "held-out questions (cons@k)", GREEN, is_rare=True),
        ),
        is_fraction=True,
    ),
    Figure(
        "Figure 3 of the paper: mean response length during training",
        "tokens per response",
        (
            Series("completion/length_mean", "training questions", BLUE),
            Series("eval/length_mean", "held-out questions", ORANGE, is_rare=True),
        ),
    ),
    Figure(
        "Reward components",
        "share of completions",
        (
            Series("reward/accuracy", "accuracy", BLUE),
            Series("reward/format", "format", GREEN),
            Series("completion/truncated", "truncated", GREY),
        ),
        is_fraction=True,
    ),
    Figure(
        "Trainer against generator: difference of log-probabilities",
        "|difference| (nats)",
        (
            Series("logp_diff/mean", "mean over tokens", BLUE),
            Series("logp_diff/max", "largest", RED),
        ),
        is_log=True,
    ),
)
SFT_FIGURES = (
    Figure(
        "Cross-entropy",
        "nats per token",
        (Series("loss", "training texts", BLUE), Series("eval/loss", "held-out texts", ORANGE, is_rare=True)),
    ),
    Figure(
        "Cross-entropy over tokens",
        "nats per token",
        (Series("loss", "training texts", BLUE), Series("eval/loss", "held-out texts", ORANGE, is_rare=True)),
        over_tokens=True,
    ),
    Figure("Entropy of the predictions", "nats per token", (Series("entropy", "training texts", BLUE),)),
    GRADIENT_NORM,
    LEARNING_RATE,
    SPEED,
)
REWARD_MODEL_FIGURES = (
    Figure(
        "Loss of the reward model",
        "nats per pair or label",
        (Series("loss", "training rows", BLUE), Series("eval/loss", "held-out rows", ORANGE, is_rare=True)),
    ),
    Figure(
        "Accuracy of the reward model",
        "share of pairs or labels",
        (
            Series("accuracy", "training rows", BLUE),
            Series("eval/accuracy", "held-out rows", ORANGE, is_rare=True),
            Series("eval/auc", "held-out labels: area under the curve", GREEN, is_rare=True),
        ),
        is_fraction=True,
    ),
    Figure(
        "Scores",
        "score",
        (
            Series("chosen", "chosen texts", GREEN),
            Series("rejected", "rejected texts", RED),
            Series("difference", "difference", BLUE),
            Series("score", "labelled texts", BLUE),
        ),
    ),
    Figure(
        "Length and sureness",
        "held-out rows",
        (
            Series("eval/length_correlation", "correlation of score and length", RED, is_rare=True),
            Series("eval/calibration_error", "calibration error", BLUE, is_rare=True),
        ),
    ),
    GRADIENT_NORM,
    LEARNING_RATE,
    SPEED,
)
_DOMAIN = {"eval/loss/": ("cross-entropy", "nats per token"), "eval/accuracy/": ("accuracy", "share of rows")}
COLORS = (BLUE, ORANGE, GREEN, RED, "#8e6bb8", GREY, "#b8860b", "#0f8b8d")
PHASES = ("data", "generate", "score", "logprobs", "update", "refresh")
PHASE_COLORS = (RED, BLUE, GREEN, "#8e6bb8", ORANGE, GREY)
SMOOTH_FROM = 20  # points; with fewer the raw line is readable


def points(
    rows: list[Row], key: str, *, only_positive: bool = False, over_tokens: bool = False
) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a number under `key`.

    Args:
        rows:          metrics rows, by step.
        key:           of metrics.jsonl.
        only_positive: for a logarithmic axis.
        over_tokens:   the sum of `tokens` so far in place of steps.
    """
    places = list(accumulate(row.get("tokens") or 0 for row in rows)) if over_tokens else [row["step"] for row in rows]
    found = [(x, row[key]) for x, row in zip(places, rows, strict=True) if isinstance(row.get(key), (int, float))]
    found = [(x, value) for x, value in found if value > 0 or not only_positive]
    return [x for x, _ in found], [value for _, value in found]


def band(rows: list[Row], key: str) -> tuple[list[float], list[float], list[float]]:
    """Steps and ends of the interval of `key`, where rows have one: `<key>_low` and `<key>_high`."""
    found = [(row["step"], row.get(f"{key}_low"), row.get(f"{key}_high")) for row in rows]
    known = [(step, low, high) for step, low, high in found if low is not None and high is not None]
    return [step for step, *_ in known], [low for _, low, _ in known], [high for *_, high in known]


def smoothed(values: list[float]) -> list[float]:
    """Centered moving mean over about a tenth of the points; the window shrinks at both ends."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def figures_of(rows: list[Row]) -> tuple[Figure, ...]:
    """The figures of reinforcement learning, of supervised training, or of a reward model."""
    if any("tokens_generated" in row or "eval/pass_at_1" in row for row in rows):
        return RL_FIGURES
    used = Figure("Model FLOPs utilization", "share of the peak", (Series("mfu", "all GPUs", BLUE),))
    has_mfu = any("mfu" in row for row in rows)
    rates = any("accuracy" in row or "eval/accuracy" in row for row in rows)
    found = REWARD_MODEL_FIGURES if rates else SFT_FIGURES
    return (*found, *_by_domain(rows), *([used] if has_mfu else []))


def _by_domain(rows: list[Row]) -> list[Figure]:
    """A figure for each measure of evaluations that is known by domain."""
    found = []
    for head, (name, unit) in _DOMAIN.items():
        domains = dict.fromkeys(key for row in rows for key in row if key.startswith(head))
        colored = zip(domains, cycle(COLORS), strict=False)
        series = tuple(Series(key, key.removeprefix(head), color, is_rare=True) for key, color in colored)
        is_share = head == "eval/accuracy/"
        found += [Figure(f"Held-out {name} by domain", unit, series, is_fraction=is_share)] if domains else []
    return found


def x_label(figure: Figure) -> str:
    """What the x axis counts."""
    return "tokens" if figure.over_tokens else "optimizer step"
