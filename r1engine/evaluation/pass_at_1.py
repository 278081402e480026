"""pass@1 of k samples a question (paper, section 3: T = 0.6, top-p 0.95, the mean over k)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np

from r1engine.batch import Completion, Prompt, Runs, per_token
from r1engine.config import RlConfig
from r1engine.evaluation.consensus import consensus
from r1engine.evaluation.entries import stream_seed
from r1engine.evaluation.own_questions import same_answer
from r1engine.evaluation.statistics import estimate
from r1engine.grpo import record_of
from r1engine.ranks import World, spread
from r1engine.rewards import Score, Scorer
from r1engine.rewards.rules import rule_of
from r1engine.rollout import Generator, generate
from r1engine.rollout.draft import Sampling


@dataclass(frozen=True)
class Samples:
    """What every rank knows of the graded samples of one question; the samples stay with the rank that drew them."""

    scores: list[Score]
    lengths: list[int]  # tokens of each
    truncated: list[bool]  # of each
    consensus: float | None  # whether the majority is right; None: the question has no reference answer

    @classmethod
    def of(cls, graded: Sequence[tuple[Completion, Score]]) -> Samples:
        """Of all samples of one question."""
        return cls(
            [score for _, score in graded],
            [completion.num_tokens for completion, _ in graded],
            [completion.truncated for completion, _ in graded],
            _consensus(graded),
        )


def pass_at_1(
    generator: Generator,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    cfg: RlConfig,
    world: World,
    *,
    step: int,
    on_tokens: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], list[dict]]:
    """Sample k completions of each held-out question and grade them. Collective.

    Args:
        generator: with the weights to evaluate.
        scorer:    grades them.
        prompts:   held-out questions.
        cfg:       sections `evaluation`, `rollout` (token limit) and `seed`.
        world:     the questions are spread over its ranks.
        step:      optimizer steps done; sets the token limit. The sampling seeds are the same at every step,
                   whatever else stands in the file.
        on_tokens: called with the number of tokens of each decode step.

    Returns:
        See `heldout_metrics`; and rows of samples.jsonl, on the first rank: the first sample, graded, of each of the
        first `cfg.log.samples` questions.
    """
    k = cfg.evaluation.samples
    # An id that no question of another file has, nor one at another place of this file.
    prompts = [replace(p, id=stream_seed(cfg.seed, "heldout", p.question.text, 0)) for p in prompts]

    rows: list[tuple[int, dict]] = []  # of this rank

    def work(own: list[Prompt]) -> list[Samples]:
        with generator.awake():
            completions = generate(
                generator,
                own,
                num_samples=k,
                step=-1,  # no training step
                max_tokens=cfg.rollout.max_tokens_at(step),
                sampling=Sampling(cfg.evaluation.temperature, cfg.evaluation.top_p),
                on_tokens=on_tokens,
            )
        scores = scorer.score((record_of(c) for c in completions), are_rated=False)
        graded = list(zip(completions, scores, strict=True))
        groups = [graded[i : i + k] for i in range(0, len(graded), k)]
        numbers = range(world.rank, cfg.log.samples, world.size)
        rows.extend((number, sample_row(*group[0])) for number, group in zip(numbers, groups, strict=False))
        return [Samples.of(group) for group in groups]

    groups = spread(prompts, world, work)
    shown = sorted((row for own in world.at_first(rows) for row in own), key=lambda row: row[0])
    return heldout_metrics(groups), [row for _, row in shown]


def heldout_metrics(groups: list[Samples]) -> dict[str, float]:
    """What is logged of graded samples, question by question.

    eval/pass_at_1 is the mean over questions of the mean over their decided samples, with its 95 % interval over
    questions, eval/pass_at_1_low and _high; a question without a decided sample is left out. eval/undecided_wrong and
    _right are what pass@1 would be if every undecided sample were wrong, or right. eval/cons_at_k is the share of the
    questions with a reference answer whose majority of all samples is right (`consensus`). eval/format (also of decided
    samples), eval/length_mean (tokens), eval/truncated and eval/undecided are means over samples.
    """
    decided = [[score for score in group.scores if score.verdict != "undecided"] for group in groups]
    known = [score for scores in decided for score in scores]
    right = [sum(score.verdict == "right" for score in scores) for scores in decided]
    lengths = [length for group in groups for length in group.lengths]
    metrics = {
        "eval/format": sum(score.components.get("format", 0.0) for score in known) / max(1, len(known)),
        "eval/length_mean": sum(lengths) / len(lengths),
        "eval/truncated": sum(sum(group.truncated) for group in groups) / len(lengths),
        "eval/undecided": 1 - len(known) / len(lengths),
    }
    if agreed := [group.consensus for group in groups if group.consensus is not None]:
        metrics["eval/cons_at_k"] = fmean(agreed)
    shares = [count / len(scores) for count, scores in zip(right, decided, strict=True) if scores]
    if not shares:  # unknown is not 0
        return metrics
    found = estimate(shares)
    metrics |= {"eval/pass_at_1": found.mean, "eval/pass_at_1_low": found.low, "eval/pass_at_1_high": found.high}
    if len(known) < len(lengths):
        sizes = [len(group.scores) for group in groups]
        missing = [size - len(scores) for size, scores in zip(sizes, decided, strict=True)]
        metrics["eval/undecided_wrong"] = fmean(c / n for c, n in zip(right, sizes, strict=True))
        metrics["eval/undecided_right"] = fmean((c + m) / n for c, m, n in zip(right, missing, sizes, strict=True))
    return metrics


def _consensus(group: Sequence[tuple[Completion, Score]]) -> float | None:
    """Whether the majority of a question's samples is right; answers that take no computing to compare are merged.
    None: the question has no reference answer."""
    question = group[0][0].prompt.question
    rule = rule_of(question.reward, "data")
    if rule.needs != "answer":
        return None
    find = rule.find
    answers = [find(record_of(completion))[0] for completion, _ in group]
    return consensus(answers, [score.verdict == "right" for _, score in group], partial(same_answer, question))


def sample_row(completion: Completion, graded: Score, advantage: float | Runs | None = None) -> dict:
    """One completion as a row of samples.jsonl."""
    return {
        "prompt": completion.prompt.text,
        "question": completion.prompt.question.text,
        "answer": completion.prompt.question.answer,
        "completion": completion.text,
        **{f"reward/{name}": value for name, value in graded.components.items()},
        "verdict": graded.verdict,
        "reason": graded.reason,
        "advantage": None if advantage is None else np.asarray(per_token(advantage)).tolist(),
        "length": len(completion.tokens),
        "truncated": completion.truncated,
    }
