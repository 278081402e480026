"""The stage `sample`: questions -> answers, graded, chunk after chunk. A killed one draws the chunks that lack."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from r1engine import config
from r1engine.batch import Prompt
from r1engine.config.sample import SampleConfig
from r1engine.observe.progress import Progress
from r1engine.ranks import World
from r1engine.sampling.chunks import Chunks, Counts, row_of
from r1engine.sampling.drawing import NO_REPLY, AnswerSampler, Graded, open_sampler, rows_at_first


def sample(cfg: SampleConfig, world: World, digests: dict[str, str]) -> dict[str, Any]:
    """Draw what is missing. Collective.

    Args:
        cfg:     of the stage.
        world:   the ranks share the questions of a chunk.
        digests: key of `cfg.inputs()` -> SHA-256.

    Returns:
        What the stage has to tell: drawn, right and kept answers, tokens, also by domain.

    Raises:
        ValueError: the model, the questions or a server of the rewards does not fit the configuration.
        RunFailed: a judge is away; what is drawn so far is kept.
    """
    around = _around(cfg.prompt)
    chunks = world.from_first(lambda: Chunks(cfg.run_dir, _identity(cfg, digests)))
    with (
        Progress(cfg.run_dir.name, enabled=world.is_first) as progress,
        open_sampler(cfg.as_run(), cfg.rewards, world, progress, around=around) as sampler,
    ):
        _draw_missing(cfg, world, sampler, chunks, progress)
    return _told(chunks.total())


def _draw_missing(cfg: SampleConfig, world: World, sampler: AnswerSampler, chunks: Chunks, progress: Progress) -> None:
    size = cfg.chunk_questions
    count = -(-len(sampler.prompts) // size)
    here = [number for number in range(count) if chunks.counts(number) is not None]
    if here and len(here) < count:
        progress.note(f"{len(here)} of {count} chunks are there; going on")
    if world.is_first:
        config.dump(cfg, cfg.run_dir / "config.yaml")
    before: Counter[str] = Counter()  # kept answers of the chunks before, by domain
    progress.start(len(here), count)
    done = len(here)
    for number in range(count):
        if (counts := chunks.counts(number)) is None:
            asked = sampler.prompts[number * size : (number + 1) * size]
            asked = [prompt for prompt in asked if not _is_reached(cfg, before, prompt.question.counted_as)]
            if not asked:
                continue
            counts = _chunk(cfg, world, sampler, chunks, number, asked, progress)
            done += 1
            progress.step(done, _row(chunks.total()))
        before.update({domain: found["kept"] for domain, found in (counts or {}).items()})


def _is_reached(cfg: SampleConfig, kept: Counter[str], domain: str) -> bool:
    target = (cfg.target_right or {}).get(domain)
    return target is not None and kept[domain] >= target


def _chunk(
    cfg: SampleConfig,
    world: World,
    sampler: AnswerSampler,
    chunks: Chunks,
    number: int,
    asked: list[Prompt],
    progress: Progress,
) -> Counts:
    """Draw a chunk on all ranks, and write it on the first; its counts."""
    progress.phase("draw")
    own, started = asked[world.rank :: world.size], time.monotonic()
    groups = _rounds(cfg, sampler, own, progress)
    rows = [[row_of(*graded) for graded in group] for group in groups]
    away = [score.reason for group in groups for _, score in group if score.reason.startswith(NO_REPLY)]
    whole = rows_at_first(world, away, rows, cfg.run_dir, f"{len(chunks)} chunks are kept")
    counts = world.from_first(lambda: chunks.write(number, whole))
    chunks.note(number, counts)
    rate = sum(row["num_tokens"] for row in whole) / (time.monotonic() - started)
    progress.note(f"  chunk {number}: {len(whole)} answers, {rate:,.0f} tokens a second")
    return counts


def _rounds(cfg: SampleConfig, sampler: AnswerSampler, prompts: list[Prompt], progress: Progress) -> list[list[Graded]]:
    """The answers to each question, in rounds where early_stop is set."""
    if not prompts:
        return []
    size = cfg.early_stop or cfg.samples
    found: list[list[Graded]] = [[] for _ in prompts]
    for first in range(0, cfg.samples, size):
        numbers = range(first, min(first + size, cfg.samples))
        open_ones = [i for i, group in enumerate(found) if _right(group) < (cfg.early_stop or cfg.samples + 1)]
        if open_ones:
            groups = sampler.draw([prompts[i] for i in open_ones], numbers, progress.advance)
            for i, group in zip(open_ones, groups, strict=True):
                found[i] += group
    return found


def _right(group: list[Graded]) -> int:
    return sum(score.verdict == "right" and not completion.truncated for completion, score in group)


def _around(path: Path | None) -> str:
    if path is None:
        return "{question}"
    text = path.read_text(encoding="utf-8")
    if text.count("{question}") != 1:
        raise ValueError(f"prompt: {path}: found {text.count('{question}')} times {{question}}, required once")
    return text


def _identity(cfg: SampleConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What the answers depend on."""
    rollout = cfg.rollout
    return {
        "model": digests["model.path"],
        "questions": digests["questions"],
        "prompt": digests.get("prompt"),
        "seed": cfg.seed,
        "template": cfg.template,
        "system": cfg.system,
        "think": cfg.think,
        "samples": cfg.samples,
        "early_stop": cfg.early_stop,
        "chunk_questions": cfg.chunk_questions,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_tokens": rollout.max_tokens_at(0),
        "engine": rollout.engine,
    }


def _row(total: Counts) -> dict[str, float]:
    """What the progress shows."""
    drawn = sum(counts["drawn"] for counts in total.values())
    right = sum(counts.get("right", 0) for counts in total.values())
    return {"drawn": drawn, "accepted": right / drawn if drawn else 0.0}


def _told(total: Counts) -> dict[str, Any]:
    whole: Counter[str] = Counter()
    for counts in total.values():
        whole.update(counts)
    return {name: whole[name] for name in ("drawn", "right", "wrong", "undecided", "truncated", "kept", "tokens")} | {
        "domains": total
    }
