"""Which questions of a rollout have a signal: completions of unequal reward, without which eq. 3 gives only zeros."""

from __future__ import annotations

from statistics import fmean, stdev

from r1engine.config import RlConfig
from r1engine.grpo import total_rewards
from r1engine.stages.homes import Graded


def rewards_by_group(graded: list[Graded], cfg: RlConfig, step: int) -> list[list[float]]:
    """The known rewards of each question's completions."""
    size = cfg.grpo.group_size
    groups = [graded[i : i + size] for i in range(0, len(graded), size)]
    weights = cfg.rewards.weights_at(step)
    # One by one: a question that was drawn twice is two groups.
    totals = [total_rewards(group, cfg.grpo, weights) for group in groups]
    return [[reward for reward in group if reward is not None] for group in totals]


def has_signal(rewards: list[float]) -> bool:
    """Whether the completions of a question differ in reward."""
    return len(set(rewards)) > 1


def num_missing(graded: list[Graded], cfg: RlConfig, step: int) -> int:
    """Questions with a signal that the rollout lacks."""
    return max(0, cfg.questions_at(step) - sum(map(has_signal, rewards_by_group(graded, cfg, step))))


def with_signal_first(graded: list[Graded], cfg: RlConfig, step: int) -> list[Graded]:
    """The questions of a rollout out of all that were drawn: those without a signal only where there are no others."""
    size, count = cfg.grpo.group_size, cfg.questions_at(step)
    if len(graded) == size * count:
        return graded
    signals = [has_signal(rewards) for rewards in rewards_by_group(graded, cfg, step)]
    order = sorted(range(len(signals)), key=lambda number: not signals[number])[:count]  # stable
    return [pair for number in sorted(order) for pair in graded[number * size : (number + 1) * size]]


def group_metrics(graded: list[Graded], cfg: RlConfig, step: int) -> dict[str, float]:
    """Means over the questions that were drawn: how far apart their completions' rewards are.

    reward/std is the mean of the standard deviations (of the sample) of questions with two known rewards.
    """
    size = cfg.grpo.group_size
    rewards = rewards_by_group(graded, cfg, step)
    verdicts = [{score.verdict for _, score in graded[i : i + size]} for i in range(0, len(graded), size)]
    spreads = [stdev(group) for group in rewards if len(group) > 1]
    return {
        **({"reward/std": fmean(spreads)} if spreads else {}),
        "groups/without_signal": fmean(not has_signal(group) for group in rewards),
        "groups/all_right": fmean(verdict == {"right"} for verdict in verdicts),
        "groups/all_wrong": fmean(verdict == {"wrong"} for verdict in verdicts),
        "groups/drawn_again": float(len(rewards) - cfg.questions_at(step)),
    }
