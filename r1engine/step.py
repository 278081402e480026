"""One iteration of GRPO, from questions to refreshed generator weights. Read this file first.

    prompts -> completions -> rewards -> advantages -> packed rows -> log-probabilities -> updates -> refresh

Every rank runs this code (SPMD). Generation and grading are spread over all ranks; the updates run in Megatron's
tensor / pipeline / data layout.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist

from r1engine.batch import Completion, PackedBatch, Prompt, Sample, pack
from r1engine.config import Config
from r1engine.grpo import learning_rate, objective, record_of, split_minibatches, to_samples, total_rewards
from r1engine.model.parallel import World
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rewards import Score, Scorer
from r1engine.rewards.shaping import shape
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.rollout.rollouts import Ahead
from r1engine.rollout.sglang.generator import SglangGenerator
from r1engine.rollout.spread import spread

Graded = tuple[Completion, Score]
RATIO_EDGES = (0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0)  # bins of pi_trainer / pi_generator in the metrics


@dataclass
class Parts:
    """What an iteration works with."""

    cfg: Config
    world: World
    policy: Policy
    generator: LocalGenerator | SglangGenerator
    phases: Phases
    progress: Progress
    scorer: Scorer
    reference: dict[str, torch.Tensor] | None = None  # frozen weights; None when kl_coef is 0
    ahead: Ahead | None = None  # draws the next rollout during the updates; None: on-policy


@dataclass(frozen=True)
class Iteration:
    """What came of it."""

    metrics: dict[str, float]
    graded: list[Graded]
    samples: list[Sample]


def iterate(parts: Parts, prompts: list[Prompt] | None, step: int) -> Iteration:
    """One rollout of `prompts` and the optimizer steps made from it (R1 eq. 1-3).

    Args:
        parts:   model, generator and their company.
        prompts: the questions, the same on every rank; None: those that `parts.ahead` has.
        step:    optimizer steps done before.

    Returns:
        Metrics over the whole rollout (the same on every rank), the graded completions and their samples.
    """
    cfg = parts.cfg
    graded = rollout(parts, prompts, step)
    rewards = total_rewards(graded, cfg.grpo, cfg.rewards.weights_at(step))
    samples = to_samples([c for c, _ in graded], rewards, cfg.grpo)
    minibatches = [
        pack_rows(parts, part, step)
        for part in split_minibatches(samples, cfg.grpo.minibatches, seed=cfg.seed, step=step)
    ]
    rows = [row for minibatch in minibatches for row in minibatch]

    with parts.policy.awake():
        with parts.ahead.drawing() if parts.ahead is not None else nullcontext():
            stats = update(parts, minibatches, step)
        refresh(parts)

    metrics = rollout_metrics(graded, rewards) | update_metrics(stats) | mismatch(rows, parts.world)
    if parts.ahead is not None:
        metrics |= parts.ahead.metrics([c for c, _ in graded])
    metrics |= parts.generator.metrics()
    return Iteration(metrics, graded, samples)


def update(parts: Parts, minibatches: list[list[PackedBatch]], step: int) -> list[dict[str, float]]:
    """The optimizer steps made from one rollout; the statistics of each."""
    cfg, phases, rows = parts.cfg, parts.phases, [row for minibatch in minibatches for row in minibatch]
    with phases("logprobs"):
        if parts.reference is not None:
            for row, logp in zip(rows, parts.policy.reference_logprobs(parts.reference, rows), strict=True):
                row.ref_logp = logp
        if cfg.steps_per_rollout > 1:  # before the first update moves the policy
            for row, logp in zip(rows, parts.policy.logprobs(rows), strict=True):
                row.old_logp = logp
    with phases("update"):
        stats: list[dict[str, float]] = []
        for minibatch in minibatches * cfg.grpo.inner_epochs:
            lr = learning_rate(step + len(stats), cfg.steps, cfg.optimizer)
            stats.append(parts.policy.update(minibatch, partial(objective, cfg=cfg.grpo), lr) | {"lr": lr})
    return stats


def rollout(parts: Parts, prompts: list[Prompt] | None, step: int) -> list[Graded]:
    """G completions of each prompt, graded; group after group, the same on every rank."""
    cfg, phases, size, advance = parts.cfg, parts.phases, parts.cfg.grpo.group_size, parts.progress.advance

    def sample_and_grade(own: list[Prompt] | list[None]) -> list[list[Graded]]:
        parts.progress.phase("generate")  # counts tokens, of which nobody knows how many there will be
        with phases("generate"):
            completions = sample(parts, own, step) if parts.ahead is None else parts.ahead.take(step, advance)
        with phases("score"):
            records = (record_of(completion) for completion in completions)
            scores = parts.scorer.score(records, are_rated=cfg.rewards.is_rated_at(step))
            groups = [slice(i, i + size) for i in range(0, len(completions), size)]
            shaped = [shape_group(completions[group], scores[group], cfg, step) for group in groups]
        return [list(zip(completions[group], done, strict=True)) for group, done in zip(groups, shaped, strict=True)]

    places = [None] * cfg.grpo.questions if prompts is None else prompts
    groups = spread(places, parts.world.rank, parts.world.size, sample_and_grade)
    parts.progress.phase("train")
    return [pair for group in groups for pair in group]


def sample(parts: Parts, prompts: list[Prompt], step: int) -> list[Completion]:
    """G completions of each of this rank's prompts, by the present weights."""
    cfg = parts.cfg
    with parts.generator.awake():
        return parts.generator.generate(
            prompts,
            num_samples=cfg.grpo.group_size,
            step=step,
            max_tokens=cfg.max_tokens_at(step),
            temperature=cfg.rollout.temperature,
            top_p=cfg.rollout.top_p,
            top_k=cfg.rollout.top_k,
            on_tokens=parts.progress.advance,
        )


def refresh(parts: Parts) -> None:
    """The policy's weights into the generator; servers of another process also prove that they compute the same."""
    with parts.phases("refresh"):
        parts.generator.load_weights(parts.policy.weights())
        if isinstance(parts.generator, SglangGenerator) and parts.cfg.rollout.sglang.verify:
            parts.generator.check_canaries(parts.policy.logprobs, row_multiple=parts.policy.row_multiple)


def shape_group(completions: list[Completion], scores: list[Score], cfg: Config, step: int) -> list[Score]:
    """The scores of one question with the shaping terms that the config gives a weight; none by default."""
    terms = frozenset(name for name in ("length", "overlong", "repetition") if getattr(cfg.rewards, name))
    if not terms:
        return scores
    return shape(
        scores,
        [completion.text for completion in completions],
        [len(completion.tokens) for completion in completions],
        limit=cfg.max_tokens_at(step),
        overlong_margin=cfg.rewards.overlong_margin,
        repetition_ngram=cfg.rewards.repetition_ngram,
        terms=terms,
    )


def pack_rows(parts: Parts, samples: list[Sample], step: int) -> list[PackedBatch]:
    """This data-parallel rank's rows of one mini-batch, on its device."""
    cfg, world = parts.cfg, parts.world
    shards = pack(
        samples,
        max_tokens=cfg.row_tokens,
        shards=world.dp_size,
        multiple=parts.policy.row_multiple,
        num_rows_multiple=parts.policy.num_rows_multiple,
        weighting=cfg.grpo.loss_weight,
        constant_tokens=cfg.max_tokens_at(step),
        # Without a KL term a sample of advantage 0 adds exactly nothing: neither loss nor gradient.
        skip_zero_advantage=cfg.grpo.kl_coef == 0,
        replays_experts=cfg.model.routing_replay,
        version=parts.generator.weight_version if parts.ahead is not None else None,
    )
    return [row.to(world.device) for row in shards[world.dp_rank]]


def rollout_metrics(graded: list[Graded], rewards: list[float | None]) -> dict[str, float]:
    """Means over the rollout: reward, each component, lengths (tokens), shares truncated and undecided.

    A mean of nothing, such as the reward where all is undecided, is left out: it is not 0.
    """
    known = [r for r in rewards if r is not None]
    decided = [s for _, s in graded if s.verdict != "undecided"]
    lengths = [len(c.tokens) for c, _ in graded]
    values = defaultdict(list)
    for score in decided:
        for name, value in score.components.items():
            values[name].append(value)
    return {
        **({"reward/mean": sum(known) / len(known)} if known else {}),
        **{f"reward/{name}": sum(found) / len(found) for name, found in sorted(values.items())},
        "reward/undecided": 1 - len(decided) / len(graded),
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/length_max": max(lengths),
        "completion/truncated": sum(c.truncated for c, _ in graded) / len(graded),
        "tokens_generated": sum(lengths),
    }


def update_metrics(stats: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of the iteration; weighted sums are divided by their weights."""

    def mean(name: str, weight: str | None = None) -> float:
        return sum(s[name] / (max(s[weight], 1e-12) if weight else 1) for s in stats) / len(stats)

    weighted = {name: mean(name, "weight") for name in ("kl", "clip_fraction", "ratio", "entropy")}
    return weighted | {name: mean(name) for name in ("loss", "grad_norm", "lr")}


def mismatch(rows: list[PackedBatch], world: World) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the generator's, over the sampled tokens of all ranks.

    Both are of the weights that the rollout was drawn from; tokens that were drawn from older ones are left out. What
    separates them is rounding and, if it grows, a bug: stale weights, another temperature, another tokenization.

    Returns:
        With d = log pi_trainer - log pi_generator (nats): logp_diff/mean and /max of |d|; logp_diff/kl, the mean of
        exp(d) - 1 - d, which estimates KL(generator || trainer) without bias (k3); and logp_ratio/<bin>, the shares of
        tokens whose exp(d) lies in each bin. Nothing if there are no such tokens.
    """
    edges = torch.tensor(RATIO_EDGES, dtype=torch.float64, device=world.device)
    sums = torch.zeros(3 + len(edges) + 1, dtype=torch.float64, device=world.device)  # tokens, |d|, k3, bins
    largest = torch.zeros(1, dtype=torch.float64, device=world.device)
    for row in rows:
        if row.old_logp is None:  # only the last pipeline stage has it when there is a single update
            continue
        chosen = row.loss_weight != 0 if row.stale is None else (row.loss_weight != 0) & ~row.stale
        difference = (row.old_logp - row.rollout_logp)[chosen].double()
        if len(difference):
            bins = torch.bincount(torch.bucketize(difference.exp(), edges), minlength=len(edges) + 1)
            moments = [torch.ones_like(difference), difference.abs(), difference.expm1() - difference]
            sums += torch.cat([torch.stack([m.sum() for m in moments]), bins.double()])
            largest = torch.maximum(largest, difference.abs().max())
    if world.size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    tokens, *values = sums.tolist()
    if not tokens:
        return {}
    names = [f"{low:g}-{high:g}" for low, high in pairwise((0.0, *RATIO_EDGES, float("inf")))]
    means = dict(zip(["logp_diff/mean", "logp_diff/kl", *(f"logp_ratio/{n}" for n in names)], values, strict=True))
    return {name: value / tokens for name, value in means.items()} | {"logp_diff/max": float(largest)}
