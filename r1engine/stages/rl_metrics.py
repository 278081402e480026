"""The metrics of a GRPO iteration: of the rollout, of the updates, and how far trainer and generator are apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.distributed as dist

from r1engine.batch import PackedBatch
from r1engine.ranks import World
from r1engine.stages.homes import Graded

RATIO_EDGES = (0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0)  # bins of pi_trainer / pi_generator in the metrics


def rollout_metrics(
    graded: list[Graded], rewards: list[float | None], weights: Mapping[str, float]
) -> dict[str, float]:
    """Means over the rollout: reward, each component, lengths (tokens), shares truncated and undecided.

    A mean of nothing, such as the reward where all is undecided, is left out: it is not 0.
    """
    known = [r for r in rewards if r is not None]
    decided = [s for _, s in graded if not s.is_undecided(weights)]
    lengths = [c.num_tokens for c, _ in graded]
    values = defaultdict(list)
    for score in decided:
        for name, value in score.components.items():
            values[name].append(value)
    by_verdict = {name: [c.num_tokens for c, score in graded if score.verdict == name] for name in ("right", "wrong")}
    return {
        **({"reward/mean": sum(known) / len(known)} if known else {}),
        **{f"reward/{name}": sum(found) / len(found) for name, found in sorted(values.items())},
        "reward/undecided": 1 - len(decided) / len(graded),
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/length_max": max(lengths),
        **{f"completion/length_{name}": sum(found) / len(found) for name, found in by_verdict.items() if found},
        "completion/truncated": sum(c.truncated for c, _ in graded) / len(graded),
        "tokens_generated": sum(lengths),
    }


def silent_functions(graded: list[Graded]) -> list[str]:
    """What to tell of the user's functions that gave no value for any completion of a rollout."""
    names = {name for _, score in graded for name in score.unknown}
    last = graded[-1][1].unknown
    return [
        f"rewards.functions.{name} gave no value for any of {len(graded)} completions: {last[name]}"
        for name in sorted(names)
        if all(name in score.unknown for _, score in graded)
    ]


def update_metrics(stats: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of the iteration; weighted sums are divided by their weights."""

    def mean(name: str, weight: str | None = None) -> float:
        return sum(s[name] / (max(s[weight], 1e-12) if weight else 1) for s in stats) / len(stats)

    names = ("kl", "clip_fraction", "ratio", "entropy", *(["mtp_loss"] if "mtp_loss" in stats[0] else []))
    weighted = {name: mean(name, "weight") for name in names}
    return weighted | {name: mean(name) for name in ("loss", "grad_norm", "lr")}


def mismatch(rows: list[PackedBatch], world: World) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the generator's, over the sampled tokens of all ranks.

    Both are of the weights that drew the rollout; tokens of older weights are left out. Rounding separates the two. If
    the difference grows, there is a bug: stale weights, another temperature, another tokenization.

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
