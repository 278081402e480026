"""The stage `evaluate`: answers of each model to the held-out questions, kept as they are drawn, and the table."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from r1engine.config.evaluate import EvaluateConfig
from r1engine.grpo import record_of
from r1engine.observe.progress import Progress
from r1engine.observe.put import put_json, put_text
from r1engine.ranks import World, interleaved
from r1engine.rewards.language import language_of, language_share
from r1engine.rewards.thoughts import split_thoughts
from r1engine.sampling.drawing import Graded, open_sampler
from r1engine.sampling.table import markdown, table_of
from r1engine.sampling.whole_lines import lines_of, whole_lines

Row = dict[str, Any]


def evaluate(cfg: EvaluateConfig, world: World, digests: dict[str, str]) -> dict[str, Any]:
    """Draw what is missing and write the table. Collective.

    Args:
        cfg:     of the stage.
        world:   the ranks share the questions.
        digests: key of `cfg.inputs()` -> SHA-256, so that answers of another model are not taken for this one's.

    Returns:
        pass@1 of each model.

    Raises:
        ValueError: a model or the questions do not fit the configuration.
    """
    answers: dict[str, list[Row]] = {}  # of each model, on the first rank
    with Progress(cfg.run_dir.name, enabled=world.is_first) as progress:
        progress.start(0, len(cfg.models))
        for number, name in enumerate(cfg.names):
            path = cfg.run_dir / "answers" / f"{name}.jsonl"
            identity = _identity(cfg, number, digests)
            if not world.from_first(partial(_take_earlier, answers, name, path, identity)):
                answers[name] = _draw(cfg, number, world, progress)
                if world.is_first:
                    _write(path, identity, answers[name])
            progress.step(number + 1, {"drawn": float(len(answers.get(name, [])))})

    def write() -> dict[str, Any]:
        table = table_of(answers, breaks=cfg.breaks)
        put_json(cfg.run_dir / "table.json", table)
        put_text(cfg.run_dir / "table.md", markdown(table))
        return {f"pass_at_1 {name}": table["models"][name]["all"]["pass@1"]["mean"] for name in cfg.names}

    return world.from_first(write)


def _draw(cfg: EvaluateConfig, number: int, world: World, progress: Progress) -> list[Row]:
    """Graded answers of one model, question after question, on the first rank."""
    run = cfg.as_run(number)
    with open_sampler(run, cfg.rewards, world, progress) as sampler:
        progress.phase(f"draw {cfg.names[number]}")
        own = list(sampler.prompts)[world.rank :: world.size]
        groups = sampler.draw(own, range(cfg.samples), progress.advance)
        rows = [[_row(graded, cfg) for graded in group] for group in groups]
        return [row for group in interleaved(world.at_first(rows)) for row in group]


def _row(graded: Graded, cfg: EvaluateConfig) -> Row:
    """What the table needs of an answer."""
    completion, score = graded
    question = completion.prompt.question
    thoughts = split_thoughts(completion.text, think_prefilled=record_of(completion).think_prefilled).thoughts
    target = question.language or language_of(question.text, detector=cfg.rewards.language_detector)
    share = language_share(thoughts, target, detector=cfg.rewards.language_detector)[0] if thoughts and target else None
    return {
        "question": completion.prompt.id,
        "domain": question.counted_as,
        "verdict": score.verdict,
        "format": score.components.get("format"),
        "language": share,
        "tokens": len(completion.tokens),
        "truncated": completion.truncated,
        "completion": completion.text,
    }


def _identity(cfg: EvaluateConfig, number: int, digests: dict[str, str]) -> Row:
    """What the answers of a model depend on."""
    settings = cfg.as_run(number).model_dump(mode="json")
    kept = {key: settings["rollout"][key] for key in ("engine", "temperature", "top_p", "top_k", "max_tokens")}
    return {
        "model": digests[f"models.{number}.path"],
        "questions": digests["questions"],
        "template": cfg.models[number].template,
        "samples": cfg.samples,
        "seed": cfg.seed,
        "rewards": settings["rewards"],
        **kept,
    }


def _take_earlier(answers: dict[str, list[Row]], name: str, path: Path, identity: Row) -> bool:
    """Whether there are answers of an earlier start, of the same model and settings; they are taken."""
    if not path.is_file():
        return False
    head, *rows = whole_lines(path)
    if head != json.loads(json.dumps(identity)):
        return False
    answers[name] = rows
    return True


def _write(path: Path, identity: Row, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    put_text(path, lines_of([identity, *rows]))
