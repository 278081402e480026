"""The stage `label`: solutions to questions, and rollouts from their steps; written question by question.

What is written is kept: a killed stage labels the questions that lack. A question's rollouts do not depend on others.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from r1engine import config
from r1engine.batch import Prompt
from r1engine.config.label import LabelConfig
from r1engine.config.search import DRAWS
from r1engine.data.steps import HEADER
from r1engine.grpo import record_of
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer, stop_tokens
from r1engine.observe.progress import Progress
from r1engine.observe.put import put_text
from r1engine.ranks import World
from r1engine.rollout.draft import Draft, Sampling
from r1engine.sampling.drawing import NO_REPLY, AnswerSampler, open_sampler, rows_at_first
from r1engine.sampling.whole_lines import lines_of, whole_lines
from r1engine.search.label import Answers, Labelled, Labeller, RolledOut, RolloutAsk, Steps, make_labellers
from r1engine.search.steps import StepMarks

FILE = "steps.jsonl"
ROLLOUTS = 1_000_000  # streams of a question from here on are rollouts; those before are solutions
MARKED = 64  # solutions among which a mark is looked for
LISTED = 5  # questions that are named


def label(cfg: LabelConfig, world: World, digests: dict[str, str]) -> dict[str, Any]:
    """Label what is missing. Collective.

    Args:
        cfg:     of the stage.
        world:   the ranks share the questions.
        digests: key of `cfg.inputs()` -> SHA-256.

    Returns:
        Solutions, steps, labelled ones, the share of wrong ones, rollouts and tokens.

    Raises:
        ValueError: the model, the questions or a file of other labels does not fit the configuration.
        RunFailed:  a judge is away; what is labelled so far is kept.
    """
    file = StepFile(cfg.run_dir / FILE)
    done = world.from_first(partial(file.begin, _identity(cfg, digests)))
    if world.is_first:
        config.dump(cfg, cfg.run_dir / "config.yaml")
    with (
        Progress(cfg.run_dir.name, enabled=world.is_first) as progress,
        open_sampler(cfg.as_run(), cfg.rewards, world, progress) as sampler,
    ):
        crew = LabelCrew(cfg, sampler)
        missing = [prompt for prompt in sampler.prompts[: len(sampler.prompts)] if prompt.id not in done]
        if done and missing:
            progress.note(f"{len(done)} of {len(sampler.prompts)} questions are labelled; going on")
        progress.start(len(sampler.prompts) - len(missing), len(sampler.prompts))
        for start in range(0, len(missing), cfg.questions_at_once):
            asked = missing[start : start + cfg.questions_at_once]
            rows = _labelled(crew, cfg.run_dir, world, asked, progress)
            world.from_first(partial(file.append, rows))
            progress.step(len(sampler.prompts) - len(missing) + start + len(asked), {"solutions": len(rows)})
    if missing and not any(world.everyones(crew.with_mark)):
        marks = ", ".join(map(repr, cfg.steps.marks))
        progress.note(f"steps.marks: found {marks}, which no solution of {len(missing)} questions has")
    return world.from_first(file.summary)


def _labelled(
    crew: LabelCrew, run_dir: Path, world: World, prompts: list[Prompt], progress: Progress
) -> list[dict[str, Any]]:
    """Rows of these questions, from all ranks, on the first."""
    progress.phase("draw")
    own = crew.label(prompts[world.rank :: world.size])
    rows = rows_at_first(world, crew.away, own, run_dir, "what is labelled so far is kept")
    blind = [row["id"].partition("/")[0] for row in rows if all(label is None for label in row["labels"])]
    if blind:
        progress.note(f"no step is labelled of {len(blind)} solutions ({_named(blind)}): nothing is decided")
    told = {row["id"].partition("/")[0] for row in rows}
    if silent := [number for prompt in prompts if (number := str(prompt.id)) not in told]:
        progress.note(f"nothing is written of {len(silent)} questions ({_named(silent)}): no solution is decided")
    return rows


def _named(questions: list[str]) -> str:
    named = list(dict.fromkeys(questions))
    return f"questions {', '.join(named[:LISTED])}{' ...' if len(named) > LISTED else ''}"


@dataclass
class _Labelling:
    """The labels of one question under way."""

    prompt: Prompt
    labellers: list[Labeller]
    asks: list[list[RolloutAsk]] = field(default_factory=list)  # of each labeller, [] when it has ended
    found: list[list[Labelled]] = field(default_factory=list)
    drawn: Counter[Steps] = field(default_factory=Counter)  # rollouts of each prefix
    # (prefix, how many times DRAWS rollouts it has had) -> number of the streams that its next ones have
    blocks: dict[tuple[Steps, int], int] = field(default_factory=dict)

    def streams(self, ask: RolloutAsk) -> list[int]:
        """Of the rollouts of an ask, which no other rollout of the question has."""
        first = self.drawn[ask.prefix]
        self.drawn[ask.prefix] += ask.rollouts
        found = []
        for draw in range(first, first + ask.rollouts):
            block = self.blocks.setdefault((ask.prefix, draw // DRAWS), len(self.blocks))
            found.append(ROLLOUTS + block * DRAWS + draw % DRAWS)
        return found


class LabelCrew:
    """Draws solutions and rollouts of many questions at once, and grades them."""

    def __init__(self, cfg: LabelConfig, sampler: AnswerSampler) -> None:
        """
        Args:
            cfg:     of the stage.
            sampler: with the policy whose solutions are labelled.
        """
        folder = sampler.cfg.model.folder
        self._cfg, self._sampler = cfg, sampler
        self._tokenizer: PromptTokenizer = load_tokenizer(folder)
        self._stop = stop_tokens(folder, self._tokenizer)
        self._marks = StepMarks(self._tokenizer, cfg.steps.marks, cfg.steps.max_step_tokens)
        self._looked_at = self.with_mark = 0  # solutions, until MARKED
        self.away: list[str] = []  # what graders that did not reply said

    def label(self, prompts: Sequence[Prompt]) -> list[list[dict[str, Any]]]:
        """Rows of each question.

        Raises:
            ValueError: no solution has a mark.
        """
        limit = self._sampler.cfg.rollout.max_tokens_at(0)
        drafts = [Draft(p, n, 0, n, limit) for p in prompts for n in range(self._cfg.label.solutions)]
        solutions = self._rolled(
            drafts, [p for p in prompts for _ in range(self._cfg.label.solutions)], [()] * len(drafts)
        )
        self._look(solutions)
        size = self._cfg.label.solutions
        live = []
        for index, prompt in enumerate(prompts):
            drawn = [one for one in solutions[index * size : (index + 1) * size] if one.steps]
            live.append(_Labelling(prompt, make_labellers(drawn, self._cfg.label)))
        for one in live:
            one.asks, one.found = [[] for _ in one.labellers], [[] for _ in one.labellers]
            for number, labeller in enumerate(one.labellers):
                self._advance(one, number, labeller, None)
        while any(asks for one in live for asks in one.asks):
            self._answer(live)
        return [self._rows(one) for one in live]

    def _answer(self, live: list[_Labelling]) -> None:
        """Draw the rollouts of all asks at once, and go on with those who asked."""
        limit = self._sampler.cfg.rollout.max_tokens_at(0)
        drafts, prompts, prefixes = [], [], []
        for one, ask in [(asker, ask) for asker in live for asks in asker.asks for ask in asks]:
            tokens = [token for step in ask.prefix for token in step]
            prompt = replace(one.prompt, tokens=one.prompt.tokens + tokens)
            room = max(1, limit - len(tokens))
            drafts += [Draft(prompt, i, 0, stream, room) for i, stream in enumerate(one.streams(ask))]
            prompts += [one.prompt] * ask.rollouts
            prefixes += [ask.prefix] * ask.rollouts
        rolled = iter(self._rolled(drafts, prompts, prefixes))
        for one in live:
            for number, asks in enumerate(one.asks):
                if asks:
                    answers = [[next(rolled) for _ in range(ask.rollouts)] for ask in asks]
                    self._advance(one, number, one.labellers[number], answers)

    @staticmethod
    def _advance(one: _Labelling, number: int, labeller: Labeller, answers: Answers | None) -> None:
        try:
            one.asks[number] = next(labeller) if answers is None else labeller.send(answers)
        except StopIteration as ended:
            one.asks[number], one.found[number] = [], ended.value

    def _rolled(self, drafts: list[Draft], prompts: list[Prompt], prefixes: Sequence[Steps]) -> list[RolledOut]:
        """Draws what is left of completions behind prefixes, and grades the whole ones."""
        sampler, rollout = self._sampler, self._sampler.cfg.rollout
        if not drafts:
            return []
        with sampler.generator.awake():
            sampler.generator.draw(drafts, Sampling(rollout.temperature, rollout.top_p, rollout.top_k))
        whole = []
        for draft, prompt, prefix in zip(drafts, prompts, prefixes, strict=True):
            before = [token for step in prefix for token in step]
            tokens, logp = before + draft.tokens, [0.0] * len(before) + draft.logp
            whole.append(replace(draft, prompt=prompt, tokens=tokens, logp=logp))
        records = [record_of(completion) for completion in sampler.generator.completions(whole)]
        scores = [future.result() for future in [sampler.scorer.submit(one, is_rated=False) for one in records]]
        self.away += [score.reason for score in scores if score.reason.startswith(NO_REPLY)]
        return [
            RolledOut(self._steps_of(draft.tokens), score.verdict) for draft, score in zip(drafts, scores, strict=True)
        ]

    def _steps_of(self, tokens: list[int]) -> Steps:
        ends = self._marks.ends(tokens, self._stop)
        return tuple(tuple(tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False))

    def _look(self, solutions: list[RolledOut]) -> None:
        """Refuse marks that the policy does not write."""
        if self._looked_at >= MARKED:
            return
        texts = self._tokenizer.decode_batch([[t for step in one.steps for t in step] for one in solutions])
        self._looked_at += len(texts)
        self.with_mark += sum(any(mark in text for mark in self._marks.texts) for text in texts)
        if not self.with_mark and self._looked_at >= MARKED:
            marks = " or ".join(map(repr, self._marks.texts))
            raise ValueError(
                f"steps.marks: found {marks}, required a mark that occurs in completions (0 of the first "
                f"{self._looked_at} have one)"
            )

    def _rows(self, one: _Labelling) -> list[dict[str, Any]]:
        found = [labelled for labels in one.found for labelled in labels]
        source = f"rollouts/{self._cfg.label.method}"
        rolled = sum(one.drawn.values())
        return [
            {
                "id": f"{one.prompt.id}/{number}",
                "question": one.prompt.question.text,
                "answer": one.prompt.question.answer,
                "steps": self._texts(labelled.steps),
                "labels": labelled.labels,
                "right": labelled.right,
                "decided": labelled.decided,
                "tokens": [list(step) for step in labelled.steps],
                "verdict": labelled.verdict,
                "source": source,
                "of": len(found),
                "rollouts": rolled,
            }
            for number, labelled in enumerate(found)
        ]

    def _texts(self, steps: Steps) -> list[str]:
        """Of each step; half a character is shown as such, and the tokens say it."""
        return self._tokenizer.decode_batch([list(step) for step in steps], skip_special_tokens=False)


class StepFile:
    """The file of labelled steps: a header that says of what, then a line a solution, a question's lines together."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, identity: dict[str, Any]) -> set[int]:
        """Write the header, or keep what is there of whole questions; returns their ids.

        Raises:
            ValueError: the file was made with another identity.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {HEADER: 1, **identity}
        found, *lines = [*whole_lines(self.path)] or [header]
        if found != header:
            changed = [key for key in header if found.get(key) != header[key]] or ["its header"]
            raise ValueError(f"{self.path}: made with other {', '.join(changed)}; choose another run_dir, or remove it")
        by_question: dict[str, list[dict[str, Any]]] = {}
        for row in lines:
            by_question.setdefault(row["id"].partition("/")[0], []).append(row)
        whole = {question: rows for question, rows in by_question.items() if len(rows) == rows[0]["of"]}
        put_text(self.path, lines_of([header, *(row for rows in whole.values() for row in rows)]))
        return {int(question) for question in whole}

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add the lines of whole questions."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(lines_of(rows))
            file.flush()
            os.fsync(file.fileno())

    def summary(self) -> dict[str, Any]:
        """What is in the file."""
        counts: Counter[str] = Counter()
        rollouts: dict[str, int] = {}
        for row in islice(whole_lines(self.path), 1, None):
            counts["solutions"] += 1
            counts["steps"] += len(row["steps"])
            known = [label for label in row["labels"] if label is not None]
            counts["labelled"] += len(known)
            counts["wrong"] += sum(label < 0.5 for label in known)
            rollouts[row["id"].partition("/")[0]] = row["rollouts"]
        names = ("solutions", "steps", "labelled", "wrong")
        return {name: counts[name] for name in names} | {"rollouts": sum(rollouts.values())}


def _identity(cfg: LabelConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What the labels depend on."""
    rollout = cfg.rollout
    return {
        "policy": digests["model.path"],
        "questions": digests["questions"],
        "seed": cfg.seed,
        "template": cfg.template,
        "system": cfg.system,
        "steps": cfg.steps.model_dump(),
        "label": cfg.label.model_dump(),
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "max_tokens": rollout.max_tokens_at(0),
        "engine": rollout.engine,
    }
