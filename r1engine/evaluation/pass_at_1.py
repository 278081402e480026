"""pass@1 of k samples a question (paper, section 3: T = 0.6, top-p 0.95, the mean over k)."""

from __future__ import annotations

from collections.abc import Callable

from r1engine.batch import Completion, Prompt
from r1engine.config import RlConfig
from r1engine.grpo import record_of
from r1engine.ranks import World, spread
from r1engine.rewards import Score, Scorer
from r1engine.rollout import Generator, generate
from r1engine.rollout.draft import Sampling


def pass_at_1(
    generator: Generator,
    scorer: Scorer,
    prompts: list[Prompt],
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
        step:      optimizer steps done; sets the token limit. The sampling seeds are the same at every step.
        on_tokens: called with the number of tokens of each decode step.

    Returns:
        Means: eval/pass_at_1, eval/format, eval/length_mean (tokens), eval/truncated, eval/undecided (its samples
        are left out of pass@1 and format); and one row a question: the first sample, graded.
    """
    k = cfg.evaluation.samples

    def work(own: list[Prompt]) -> list[list]:
        with generator.awake():
            completions = generate(
                generator,
                own,
                num_samples=k,
                step=-1,  # no training step: held-out prompts share ids with training prompts, never seeds
                max_tokens=cfg.rollout.max_tokens_at(step),
                sampling=Sampling(cfg.evaluation.temperature, cfg.evaluation.top_p),
                on_tokens=on_tokens,
            )
        scores = scorer.score((record_of(c) for c in completions), are_rated=False)
        graded = list(zip(completions, scores, strict=True))
        return [graded[i : i + k] for i in range(0, len(graded), k)]

    groups = spread(prompts, world, work)
    graded = [pair for group in groups for pair in group]
    decided: list[Score] = [s for _, s in graded if s.verdict != "undecided"]
    count = max(1, len(decided))
    lengths = [len(c.tokens) for c, _ in graded]
    metrics = {
        "eval/pass_at_1": sum(s.verdict == "right" for s in decided) / count,
        "eval/format": sum(s.components.get("format", 0.0) for s in decided) / count,
        "eval/length_mean": sum(lengths) / len(lengths),
        "eval/truncated": sum(c.truncated for c, _ in graded) / len(graded),
        "eval/undecided": 1 - len(decided) / len(graded),
    }
    return metrics, [sample_row(*group[0]) for group in groups]


def sample_row(completion: Completion, graded: Score, advantage: float | None = None) -> dict:
    """One completion as a row of samples.jsonl."""
    return {
        "prompt": completion.prompt.text,
        "question": completion.prompt.question.text,
        "answer": completion.prompt.question.answer,
        "completion": completion.text,
        **{f"reward/{name}": value for name, value in graded.components.items()},
        "verdict": graded.verdict,
        "advantage": advantage,
        "length": len(completion.tokens),
        "truncated": completion.truncated,
    }
