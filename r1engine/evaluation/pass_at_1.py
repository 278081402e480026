"""pass@1 of k samples a question (paper, section 3: T = 0.6, top-p 0.95, the mean over k)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from r1engine.batch import Completion, Prompt
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
        See `heldout_metrics`; and one row a question: the first sample, graded.
    """
    k = cfg.evaluation.samples
    # An id that no question of another file has, nor one at another place of this file.
    prompts = [replace(p, id=stream_seed(cfg.seed, "heldout", p.question.text, 0)) for p in prompts]

    def work(own: list[Prompt]) -> list[list]:
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
        return [graded[i : i + k] for i in range(0, len(graded), k)]

    groups = spread(prompts, world, work)
    return heldout_metrics(groups), [sample_row(*group[0]) for group in groups]


def heldout_metrics(groups: list[list[tuple[Completion, Score]]]) -> dict[str, float]:
    """What is logged of graded samples, question by question.

    eval/pass_at_1 is the mean over questions of the mean over their decided samples, with its 95 % interval over
    questions, eval/pass_at_1_low and _high; a question without a decided sample is left out. eval/undecided_wrong and
    _right are what pass@1 would be if every undecided sample were wrong, or right. eval/cons_at_k is the share of the
    questions with a reference answer whose majority of all samples is right (`consensus`). eval/format (also of decided
    samples), eval/length_mean (tokens), eval/truncated and eval/undecided are means over samples.
    """
    graded = [pair for group in groups for pair in group]
    decided = [[score for _, score in group if score.verdict != "undecided"] for group in groups]
    known = [score for scores in decided for score in scores]
    right = [sum(score.verdict == "right" for score in scores) for scores in decided]
    lengths = [len(completion.tokens) for completion, _ in graded]
    metrics = {
        "eval/format": sum(score.components.get("format", 0.0) for score in known) / max(1, len(known)),
        "eval/length_mean": sum(lengths) / len(lengths),
        "eval/truncated": sum(completion.truncated for completion, _ in graded) / len(graded),
        "eval/undecided": 1 - len(known) / len(graded),
    }
    agreed = [
        _consensus(group) for group in groups if rule_of(group[0][0].prompt.question.reward, "data").needs == "answer"
    ]
    if agreed:
        metrics["eval/cons_at_k"] = fmean(agreed)
    shares = [count / len(scores) for count, scores in zip(right, decided, strict=True) if scores]
    if not shares:  # unknown is not 0
        return metrics
    found = estimate(shares)
    metrics |= {"eval/pass_at_1": found.mean, "eval/pass_at_1_low": found.low, "eval/pass_at_1_high": found.high}
    if len(known) < len(graded):
        missing = [len(group) - len(scores) for group, scores in zip(groups, decided, strict=True)]
        sizes = [len(group) for group in groups]
        metrics["eval/undecided_wrong"] = fmean(c / n for c, n in zip(right, sizes, strict=True))
        metrics["eval/undecided_right"] = fmean((c + m) / n for c, m, n in zip(right, missing, sizes, strict=True))
    return metrics


def _consensus(group: list[tuple[Completion, Score]]) -> float:
    """Whether the majority of a question's samples is right; answers that take no computing to compare are merged."""
    question = group[0][0].prompt.question
    find = rule_of(question.reward, "data").find
    answers = [find(record_of(completion))[0] for completion, _ in group]
    return consensus(answers, [score.verdict == "right" for _, score in group], partial(same_answer, question))


def sample_row(completion: Completion, graded: Score, advantage: float | None = None) -> dict:
    """One completion as a row of samples.jsonl."""
    return {
        "prompt": completion.prompt.text,
        "question": completion.prompt.question.text,
        "answer": completion.prompt.question.answer,
        "completion": completion.text,
        **{f"reward/{name}": value for name, value in graded.components.items()},
        "verdict": graded.verdict,
        "reason": graded.reason,
        "advantage": advantage,
        "length": len(completion.tokens),
        "truncated": completion.truncated,
    }
