"""A process reward model as a reward in reinforcement learning: the policy's modules score the steps of completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from r1engine.batch import Completion, Sample
from r1engine.config import ConfigError, Rewards
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.model.policy import Policy
from r1engine.ranks import World
from r1engine.rewards import Score
from r1engine.search.credit import PER_TOKEN, Credit, of_completion, runs_of_tokens, step_advantages
from r1engine.search.scored_folder import NAME, read_scored_folder
from r1engine.search.steps import StepMarks
from r1engine.stages.homes import Graded, of_each, texts_of_each
from r1engine.stages.rows import of_all_shards, probabilities_at

PAYS_FOR_LENGTH = ("sum", "deepseekmath")


@dataclass(frozen=True)
class StepRater:
    """A process reward model that waits in host memory."""

    marks: StepMarks
    stop: frozenset[int]  # tokens that end a completion
    weights: dict[str, torch.Tensor]  # this rank's part
    credit: Credit  # what the scores of steps become


def make_step_rater(rewards: Rewards, policy: Policy) -> StepRater | None:
    """The process reward model of the rewards, if there is one.

    Raises:
        ConfigError: the folder is none, or of another architecture than the policy.
    """
    folder = rewards.process_model
    if folder is None:
        return None
    try:
        about = read_scored_folder(folder)
        if about is None:
            raise ValueError(f"found no {NAME} in {folder}, required a folder of stage: process_reward")
        tokenizer = load_tokenizer(policy.folder)
        marks = StepMarks(tokenizer, about.marks, about.max_step_tokens)
        weights = policy.read_reward_model(folder)
    except ValueError as error:
        raise ConfigError(f"rewards.process_model: {error}") from error
    return StepRater(marks, stop_tokens(Path(policy.folder), tokenizer), weights, rewards.process_credit)


def warning_of(rewards: Rewards) -> str:
    """What to say of the form that is asked for, "" for nothing."""
    if rewards.process and rewards.process_credit in PAYS_FOR_LENGTH:
        return f"rewards.process_credit: {rewards.process_credit} pays for steps, so for length (docs/prm.md)"
    return ""


def step_rated(graded: list[Graded], rater: StepRater, policy: Policy, world: World, row_tokens: int) -> list[Graded]:
    """The scores with those of their steps, and with the component `process`, on every rank. Collective.

    A completion without a step, or longer than the model's context, is undecided.

    Args:
        graded:     completions with what the rules say of them.
        rater:      whom to ask.
        policy:     awake.
        world:      the ranks.
        row_tokens: that a packed row holds; more where a single text has more.
    """

    def ends_of(completions: list[Completion]) -> list[list[int]]:
        return [rater.marks.ends(completion.tokens, rater.stop) for completion in completions]

    ends = of_each(graded, world, ends_of)
    texts = texts_of_each(graded, world, lambda completions: [c.prompt.tokens + c.tokens for c in completions])
    fits = [bool(end) and len(text.tokens) <= policy.shape.max_positions for end, text in zip(ends, texts, strict=True)]
    used = [i for i, is_fit in enumerate(fits) if is_fit]
    own: dict[int, list[float]] = {}
    if used:
        last = [[len(graded[i][0].prompt.tokens) + end - 1 for end in ends[i]] for i in used]
        scores = probabilities_at([texts[i] for i in used], last, policy, world, row_tokens, rater.weights)
        own = {used[number]: found for number, found in scores.items()}
    found = of_all_shards(own, world)
    return [
        (completion, _with_steps(score, ends[i], found.get(i, []), rater.credit))
        for i, (completion, score) in enumerate(graded)
    ]


def _with_steps(score: Score, ends: list[int], values: list[float], credit: Credit) -> Score:
    if not values or not all(map(math.isfinite, values)):
        return replace(score, verdict="undecided", reason="process: no step, or a text too long for the model")
    steps = tuple(zip(ends, values, strict=True))
    return replace(score, steps=steps, components=score.components | {"process": of_completion(values, credit)})


def with_step_credit(samples: list[Sample], graded: Sequence[Graded], rewards: Rewards, size: int) -> list[Sample]:
    """Samples whose tokens have the advantage of their step, too, where that is the form that is asked for.

    Args:
        samples: in groups of `size`, with the advantage of what else is rewarded.
        graded:  the same completions, with the scores of their steps.
        rewards: section `rewards`.
        size:    completions of a question.
    """
    if rewards.process_credit not in PER_TOKEN or not rewards.process:
        return samples
    found = []
    for start in range(0, len(samples), size):
        group = range(start, min(start + size, len(samples)))
        # What was cut off gets no credit for its steps, and says nothing of the others.
        counts = [not samples[i].is_masked and not graded[i][0].truncated for i in group]
        scores = [[v for _, v in graded[i][1].steps] if is_in else [] for i, is_in in zip(group, counts, strict=True)]
        for i, advantages in zip(group, step_advantages(scores, rewards.process_credit), strict=True):
            sample, ends = samples[i], [end for end, _ in graded[i][1].steps]
            assert isinstance(sample.advantage, float)
            if advantages:
                credit = runs_of_tokens(advantages, ends, sample.completion.num_tokens)
                summed = tuple((end, sample.advantage + rewards.process * one) for end, one in credit)
                sample = replace(sample, advantage=summed)
            found.append(sample)
    return found


def process_metrics(graded: Sequence[Graded]) -> dict[str, float]:
    """Means over the completions whose steps are scored: steps, mean score, lowest score."""
    scores = [[value for _, value in score.steps] for _, score in graded if score.steps]
    if not scores:
        return {}
    return {
        "process/steps": fmean(map(len, scores)),
        "process/score_mean": fmean(map(fmean, scores)),
        "process/score_min": fmean(map(min, scores)),
    }
