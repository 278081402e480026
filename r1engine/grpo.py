"""The GRPO objective of the paper (eq. 1-3) as pure functions over the fused ops."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import torch

from r1engine.batch import Completion, Outline, PackedBatch, Sample, TokenOutputs
from r1engine.config import Grpo
from r1engine.rewards import Record, Score
from r1kernels import GrpoObjective, group_advantage, grpo_loss


def record_of(completion: Completion) -> Record:
    """A completion as the rewards take it."""
    prompt = completion.prompt
    return Record(
        prompt.question,
        completion.text,
        prompt.text,
        id=f"{prompt.id}/{completion.sample}",
        num_tokens=len(completion.tokens),
        truncated=completion.truncated,
    )


def total_rewards(
    graded: Sequence[tuple[Completion | Outline, Score]], cfg: Grpo, weights: Mapping[str, float]
) -> list[float | None]:
    """Weighted sum of the reward components of each completion; None where the reward is unknown.

    An undecided score is None: unknown is not 0; so is one without the value of a user's function that has a weight.
    A truncated completion gave no answer within the limit: with `truncated: zero` it gets 0 and its overlong
    punishment, with `truncated: mask` None. Where a reward model rates the
    question, all totals may be below 0; there it gets no more than the worst completion of its question. A decided
    score may lack a component, such as the language of thoughts without words. The component then counts as the mean
    over the completions of the same question that have it.

    The sum takes weights and components as the decimals that they are written as. So totals that are equal on paper
    are equal: 0.1 + 0.2 is 0.3, and 0.3 - 0.2 - 0.1 is 0, where floats leave a difference that eq. 3 would blow up.

    Args:
        graded: every completion of a rollout with its score.
        cfg: section `grpo`.
        weights: of each component, at this step.
    """
    known = _known_components(graded)
    totals = [_total(completion, score, known[completion.prompt.id], cfg, weights) for completion, score in graded]
    return _no_better_than_rated(graded, totals)


def _known_components(graded: Sequence[tuple[Completion | Outline, Score]]) -> dict[int, dict[str, list[float]]]:
    """Prompt id -> component -> its values in the whole, decided completions of the question."""
    known: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for completion, score in graded:
        if score.verdict != "undecided" and not completion.truncated:
            for name, value in score.components.items():
                known[completion.prompt.id][name].append(value)
    return known


def _total(
    completion: Completion | Outline,
    score: Score,
    known: dict[str, list[float]],
    cfg: Grpo,
    weights: Mapping[str, float],
) -> float | None:
    """Weighted sum of one completion; `known` are the components of its question."""
    if completion.truncated:
        overlong = weights["overlong"] * score.components.get("overlong", 0.0)
        return overlong if cfg.truncated == "zero" else None
    if score.is_undecided(weights):
        return None
    total = Fraction()
    for name, weight in weights.items():
        own = score.components.get(name)
        values = known.get(name, []) if own is None else [own]
        if values:
            total += _as_written(weight) * sum(map(_as_written, values)) / len(values)
    return float(total)


def _no_better_than_rated(
    graded: Sequence[tuple[Completion | Outline, Score]], totals: list[float | None]
) -> list[float | None]:
    """The totals, where no truncated completion gets more than the worst of its question that a reward model rated."""
    worst: dict[int, float] = {}
    for (completion, _), total in zip(graded, totals, strict=True):
        if total is not None and not completion.truncated and completion.prompt.question.reward == "preference":
            worst[completion.prompt.id] = min(total, worst.get(completion.prompt.id, 0.0))
    return [
        min(total, worst.get(completion.prompt.id, total)) if total is not None and completion.truncated else total
        for (completion, _), total in zip(graded, totals, strict=True)
    ]


def _as_written(value: float) -> Fraction:
    """The shortest decimal that is read as this float, exactly: libraries change the precision of `decimal`."""
    return Fraction(Decimal(repr(float(value))))


def to_samples(completions: Sequence[Completion | Outline], rewards: Sequence[float | None], cfg: Grpo) -> list[Sample]:
    """Advantages inside each question's group (eq. 3); samples without a reward are masked and count nowhere."""
    known = [i for i, reward in enumerate(rewards) if reward is not None]
    number_of = {prompt_id: n for n, prompt_id in enumerate(dict.fromkeys(c.prompt.id for c in completions))}
    result = group_advantage(
        torch.tensor([rewards[i] for i in known], dtype=torch.float64),
        torch.tensor([number_of[completions[i].prompt.id] for i in known], dtype=torch.int64),
        mode=cfg.advantage,
        ddof=cfg.std_ddof,
    )
    advantage = dict(zip(known, result.advantage.tolist(), strict=True))
    return [Sample(c, advantage.get(i, 0.0), is_masked=i not in advantage) for i, c in enumerate(completions)]


def split_minibatches(samples: list[Sample], count: int, *, seed: int, step: int) -> list[list[Sample]]:
    """A rollout split at random into mini-batches of equal size (to one, in a smaller last rollout); the split is a
    function of (seed, step)."""
    if count == 1:
        return [samples]
    order = list(samples)
    random.Random(f"minibatches {seed} {step}").shuffle(order)
    ends = [len(order) * i // count for i in range(count + 1)]
    return [order[start:end] for start, end in pairwise(ends)]


def objective(outputs: TokenOutputs, row: PackedBatch, cfg: Grpo) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one packed row (eq. 1 and 2, negated), and sums for the metrics.

    A row without `old_logp` is in the only update of its rollout. The present policy drew it, so the old
    log-probabilities are those of this forward pass.

    An older policy drew a `stale` token. Its ratio is against the generator's own log-probability (the behaviour
    policy). Truncated importance sampling corrects what separates the generator from `old_logp`: there is nothing
    left to correct there.

    Args:
        outputs: of the policy; `logp` is differentiable, or the policy has computed the loss, too.
        row:     with ref_logp if cfg.kl_coef > 0.
        cfg:     section `grpo`.

    Returns:
        The loss, and sums weighted by loss_weight: GrpoMetrics and the entropy; and the sum of weights.
    """
    logp, weight = outputs.logp, row.loss_weight
    if outputs.loss is not None:
        loss, metrics = outputs.loss
    else:
        old_logp = row.behaviour_logp
        if old_logp is None:
            own = logp.detach()
            old_logp = own if row.stale is None else torch.where(row.stale, row.rollout_logp, own)
        loss, sums = grpo_loss(
            logp,
            old_logp,
            row.advantage,
            weight,
            objective_of(cfg),
            ref_logp=row.ref_logp,
            rollout_logp=row.rollout_logp,
            cu_seqlens=row.cu_seqlens,
        )
        metrics = sums._asdict()
    return loss, {**metrics, "entropy": (weight * outputs.entropy).sum(), "weight": weight.sum()}


def objective_of(cfg: Grpo) -> GrpoObjective:
    """What `objective` computes, as the ops take it: the fields of section `grpo` that the op takes, by their names."""
    return GrpoObjective(**{f.name: getattr(cfg, f.name) for f in fields(GrpoObjective) if f.name in Grpo.model_fields})
