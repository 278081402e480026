"""Rating in the trainer (paper, section 2.3.4): reward models that the modules of the policy run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from r1engine.batch import Completion, pack
from r1engine.config import ConfigError, Rewards
from r1engine.data.rated import RatedForm, form_of_folder
from r1engine.grpo import record_of
from r1engine.model.policy import Policy
from r1engine.ranks import World
from r1engine.rewards.rated import forgery
from r1engine.rewards.servers.preference import is_rated_by, rated_text
from r1engine.rewards.servers.reward_model import Rating
from r1engine.stages.homes import Graded, of_each, texts_of_each
from r1engine.stages.reward_loss import of_texts
from r1engine.stages.rows import of_all_shards, own_rows, shape_for


@dataclass(frozen=True)
class Rater:
    """A reward model that waits in host memory."""

    name: str  # the component that it gives
    form: RatedForm
    weights: dict[str, torch.Tensor]  # this rank's part


def make_raters(rewards: Rewards, policy: Policy) -> list[Rater]:
    """The reward models that are folders.

    Raises:
        ConfigError: a folder is no reward model, is of another architecture than the policy, or says not how it is
            to be asked.
    """
    raters = []
    for name, model in rewards.reward_models.items():
        if model.path is None:
            continue
        try:
            form = form_of_folder(model.path, model.template or None)
            raters.append(Rater(name, form, policy.read_reward_model(model.path)))
        except ValueError as error:
            raise ConfigError(f"rewards.{name}_model.path: {error}") from error
    return raters


def rated(graded: list[Graded], raters: list[Rater], policy: Policy, world: World, row_tokens: int) -> list[Graded]:
    """The scores with the components of the raters, on every rank. Collective.

    A text that holds a marker of the template, or is longer than the model's context, makes its score undecided.

    Args:
        graded:     completions with what the rules say of them.
        raters:     whom to ask.
        policy:     awake.
        world:      the ranks.
        row_tokens: that a packed row holds; more where a single text has more.
    """
    graded = list(graded)
    for rater in raters:
        asked = [i for i, (completion, _) in enumerate(graded) if is_rated_by(completion.prompt.question, rater.name)]
        ratings = _ratings([graded[i] for i in asked], rater, policy, world, row_tokens)
        for i, (rating, problem) in zip(asked, ratings, strict=True):
            completion, score = graded[i]
            if rating is not None:
                score = replace(score, components=score.components | {rater.name: rating})
            else:
                score = replace(score, verdict="undecided", reason=f"{rater.name}: {problem}")
            graded[i] = completion, score
    return graded


def _ratings(asked: list[Graded], rater: Rater, policy: Policy, world: World, row_tokens: int) -> list[Rating]:
    form = rater.form

    def tokens_of(completions: list[Completion]) -> list[list[int]]:
        pairs = [_pair(completion, rater) for completion in completions]
        return form.tokens([form.head(asked) for asked, _ in pairs], [response for _, response in pairs])

    def markers_of(completions: list[Completion]) -> list[str]:
        return [forgery(form.template, _pair(completion, rater)) for completion in completions]

    texts = texts_of_each(asked, world, tokens_of)
    markers = of_each(asked, world, markers_of)
    problems = [_problem(marker, len(text.tokens), policy) for marker, text in zip(markers, texts, strict=True)]
    used = [replace(text, advantage=float(i)) for i, text in enumerate(texts) if not problems[i]]
    if not used:
        return [(None, problem) for problem in problems]
    rows = own_rows(pack(used, shape_for(used, policy, row_tokens)), world)
    own: dict[int, float] = {}
    for row, values in zip(rows, policy.scores(rows, rater.weights), strict=True):
        score, place, weight = (of_texts(x, row).tolist() for x in (values, row.advantage, row.loss_weight))
        own |= {round(i): s for s, i, w in zip(score, place, weight, strict=True) if w > 0}
    found = of_all_shards(own, world)
    return [_rating(found.get(i), problem) for i, problem in enumerate(problems)]


def _pair(completion: Completion, rater: Rater) -> tuple[str, str]:
    """What was asked, and what of the completion is rated."""
    record = record_of(completion)
    return record.asked, rated_text(rater.name, record.completion, think_prefilled=record.think_prefilled)


def _problem(marker: str, num_tokens: int, policy: Policy) -> str:
    if marker:
        return f"the text holds {marker}, which the reward model's template uses"
    if num_tokens > policy.shape.max_positions:
        return f"the text has {num_tokens} tokens, and the model {policy.shape.max_positions} positions"
    return ""


def _rating(score: float | None, problem: str) -> Rating:
    if score is None or not math.isfinite(score):
        return None, problem or f"the score is {score}"
    return score, ""
