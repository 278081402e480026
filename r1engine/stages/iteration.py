"""One iteration of GRPO, from questions to refreshed generator weights. Read this file first.

    questions -> completions -> rewards -> advantages -> packed rows -> log-probabilities -> updates -> refresh

Every rank runs this code (SPMD). All ranks share the drawing and the grading; the updates run in Megatron's tensor /
pipeline / data layout. A completion stays with the rank that drew it; the others know its outline and its score, which
is all that rewards, advantages and the choice of rows take. Its tokens, with log-probabilities and experts, go to the
ranks whose row they are in (`own_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from r1engine.batch import Completion, PackedBatch, Sample, pack, to_sequences
from r1engine.config import RlConfig
from r1engine.grpo import objective, objective_of, record_of, split_minibatches, to_samples, total_rewards
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.ranks import World
from r1engine.rewards import Score, Scorer
from r1engine.rewards.shaping import shape
from r1engine.rollout import BrokenOff, Generator
from r1engine.rollout.rollouts import Rollouts
from r1engine.stages.groups import group_metrics, num_missing, with_signal_first
from r1engine.stages.homes import Graded, everyones_graded
from r1engine.stages.process_rating import StepRater, process_metrics, step_rated, with_step_credit
from r1engine.stages.rating import Rater, rated
from r1engine.stages.rl_metrics import mismatch, rollout_metrics, update_metrics
from r1engine.stages.rows import own_rows


@dataclass
class Parts:
    """What an iteration works with."""

    cfg: RlConfig
    world: World
    policy: Policy
    generator: Generator
    rollouts: Rollouts
    scorer: Scorer
    phases: Phases
    progress: Progress
    reference: dict[str, torch.Tensor] | None = None  # frozen weights; None when kl_coef is 0
    raters: list[Rater] = field(default_factory=list)  # reward models that the policy's modules run
    step_rater: StepRater | None = None  # a process reward model that they run


@dataclass(frozen=True)
class Iteration:
    """The result of an iteration, of all ranks; only this rank's own completions are whole."""

    metrics: dict[str, float]
    graded: list[Graded]
    samples: list[Sample]
    rewards: list[float | None]  # of each


def iterate(parts: Parts, step: int) -> Iteration:
    """One rollout and the optimizer steps made from it (R1 eq. 1-3).

    Args:
        parts: model, generator and their company.
        step:  optimizer steps done before.

    Returns:
        Metrics over the whole rollout, the graded completions and their samples; all the same on every rank.
    """
    cfg = parts.cfg
    graded, drawn = rollout(parts, step)
    weights = cfg.rewards.weights_at(step)
    rewards = total_rewards(graded, cfg.grpo, weights)
    samples = to_samples([completion for completion, _ in graded], rewards, cfg.grpo)
    samples = with_step_credit(samples, graded, cfg.rewards, cfg.grpo.group_size)
    split = split_minibatches(samples, cfg.minibatches_at(step), seed=cfg.seed, step=step)
    minibatches = [pack_rows(parts, minibatch, step) for minibatch in split]

    with parts.policy.awake():
        with parts.rollouts.drawing():
            minibatches, stats = update(parts, minibatches, step)
        refresh(parts)
    verify(parts)

    rows = [row for minibatch in minibatches for row in minibatch]
    of_drawn = rewards if drawn is graded else total_rewards(drawn, cfg.grpo, weights)
    metrics = rollout_metrics(drawn, of_drawn, weights) | process_metrics(drawn)
    metrics |= group_metrics(drawn, cfg, step) | update_metrics(stats) | mismatch(rows, parts.world)
    metrics |= parts.rollouts.metrics([completion for completion, _ in graded]) | parts.generator.metrics()
    return Iteration(metrics, graded, samples, rewards)


def rollout(parts: Parts, step: int) -> tuple[list[Graded], list[Graded]]:
    """Draw and grade G completions of each question.

    With `dynamic_sampling`, questions without a signal give way to others (DAPO), which are drawn at most so often.

    Returns:
        What is trained on, and all that was drawn, by all ranks; group after group.
    """
    cfg, drawn = parts.cfg, draw(parts, step)
    for drawing in range(1, cfg.grpo.dynamic_sampling + 1):
        if not (missing := num_missing(drawn, cfg, step)):
            break
        drawn = drawn + draw(parts, step, questions=missing, drawing=drawing)
    parts.progress.phase("train")
    return with_signal_first(drawn, cfg, step), drawn


def draw(parts: Parts, step: int, *, questions: int | None = None, drawing: int = 0) -> list[Graded]:
    """New questions' completions, this rank's own whole and the others' in outline, and scores; see `Rollouts.take`."""
    cfg, size = parts.cfg, parts.cfg.grpo.group_size
    parts.progress.phase("generate", unit="tokens")  # nobody knows how many there will be
    with parts.phases("generate"):
        completions = parts.rollouts.take(step, parts.progress.advance, questions=questions, drawing=drawing)
    with parts.phases("score"):
        records = (record_of(completion) for completion in completions)
        scores = parts.scorer.score(records, are_rated=cfg.rewards.is_rated_at(step))
        groups = [slice(i, i + size) for i in range(0, len(completions), size)]
        own = [grade_group(completions[group], scores[group], cfg, step) for group in groups]
    graded = everyones_graded(own, parts.rollouts.prompt_of, parts.world)
    if parts.raters and cfg.rewards.is_rated_at(step):
        with parts.phases("score"), parts.policy.awake():
            graded = rated(graded, parts.raters, parts.policy, parts.world, cfg.row_tokens)
    if parts.step_rater is not None:
        with parts.phases("score"), parts.policy.awake():
            graded = step_rated(graded, parts.step_rater, parts.policy, parts.world, cfg.row_tokens)
    return graded


def grade_group(
    completions: list[Completion], scores: list[Score], cfg: RlConfig, step: int
) -> list[tuple[Completion, Score]]:
    """Pair the completions of one question with their scores, and add the shaping terms that have a weight."""
    terms = frozenset(name for name in ("length", "overlong", "repetition") if getattr(cfg.rewards, name))
    if terms:
        scores = shape(
            scores,
            [completion.text for completion in completions],
            [len(completion.tokens) for completion in completions],
            limit=cfg.rollout.max_tokens_at(step),
            overlong_margin=cfg.rewards.overlong_margin,
            repetition_ngram=cfg.rewards.repetition_ngram,
            terms=terms,
        )
    return list(zip(completions, scores, strict=True))


def pack_rows(parts: Parts, samples: list[Sample], step: int) -> list[PackedBatch]:
    """This data-parallel rank's rows of one mini-batch, on its device. Collective."""
    cfg = parts.cfg
    sequences = to_sequences(
        samples,
        weighting=cfg.grpo.loss_weight,
        constant_tokens=cfg.rollout.max_tokens_at(step),
        # Without a KL term a sample of advantage 0 adds exactly nothing: neither loss nor gradient.
        skip_zero_advantage=cfg.grpo.kl_coef == 0,
        replays_experts=cfg.model.routing_replay,
        version=parts.generator.weight_version,
        rank=parts.world.rank,
    )
    shards = pack(sequences, parts.policy.row_shape(cfg.row_tokens))
    return own_rows(shards, parts.world)


def update(
    parts: Parts, minibatches: list[list[PackedBatch]], step: int
) -> tuple[list[list[PackedBatch]], list[dict[str, float]]]:
    """The optimizer steps made from one rollout.

    Returns:
        The rows with the log-probabilities that they were trained against, and the statistics of each step.
    """
    cfg, updates = parts.cfg, parts.cfg.updates_at(step)
    with parts.phases("logprobs"):
        minibatches = with_logprobs(parts, minibatches, updates)  # before the first step moves the policy
    stats: list[dict[str, float]] = []
    with parts.phases("update"):
        for rows in (minibatches * cfg.grpo.inner_epochs)[:updates]:
            lr = cfg.optimizer.lr_at(step + len(stats), cfg.steps)
            metrics, logp = parts.policy.update(rows, partial(objective, cfg=cfg.grpo), lr, objective_of(cfg.grpo))
            stats.append(metrics | {"lr": lr})
            if updates == 1 and logp:  # before its only step the policy is the old policy
                minibatches = [[replace(row, old_logp=old) for row, old in zip(rows, logp, strict=True)]]
    return minibatches, stats


def with_logprobs(parts: Parts, minibatches: list[list[PackedBatch]], updates: int) -> list[list[PackedBatch]]:
    """Add the log-probabilities of the reference and, if the rollout makes several steps, of the old policy."""
    rows = [row for minibatch in minibatches for row in minibatch]
    if parts.reference is not None:
        logps = parts.policy.reference_logprobs(parts.reference, rows)
        rows = [replace(row, ref_logp=logp) for row, logp in zip(rows, logps, strict=True)]
    if updates > 1:
        rows = [replace(row, old_logp=logp) for row, logp in zip(rows, parts.policy.logprobs(rows), strict=True)]
    following = iter(rows)
    return [[next(following) for _ in minibatch] for minibatch in minibatches]


def refresh(parts: Parts) -> None:
    """The weights of the policy, which is awake, into the generator."""
    generator = parts.generator
    with parts.phases("refresh"):
        while True:
            try:
                generator.load_weights(parts.policy.weights(dealt=generator.takes_shares))
                return
            except BrokenOff:  # each time a server less is left, and without one it is another error
                continue


def verify(parts: Parts) -> None:
    """The generator proves that it computes the same as the policy.

    The policy is asleep: the generator draws with all of its memory, which may be the policy's own device's.
    """

    def logprobs(rows: list[PackedBatch]) -> list[torch.Tensor]:
        with parts.policy.awake():
            return parts.policy.logprobs(rows)

    with parts.phases("refresh"):
        parts.generator.verify(logprobs, row_multiple=parts.policy.row_multiple)
