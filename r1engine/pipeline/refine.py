"""Refining examples with a language model (v2 B.3.2), each graded again afterwards.

Every reply is a line of refined.jsonl under the digest of what was asked, so a stage that was killed asks only what is
not answered yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from r1engine.config.curate import CurateConfig
from r1engine.data.examples import BATCH, Example, Unit, read_unit, write_examples
from r1engine.data.filters import BEFORE_REFINING
from r1engine.observe.progress import Progress
from r1engine.pipeline.replies import NO_REPLY, KeptChat, Replies, prompt_text
from r1engine.rewards.from_config import make_scorer
from r1engine.rewards.language import language_share
from r1engine.rewards.record import Record
from r1engine.rewards.scorer import Scorer
from r1engine.rewards.servers.endpoint import ModelServersError
from r1engine.rewards.thoughts import split_thoughts

CACHE = "refined.jsonl"


def asked(name: str, example: Example, thoughts: str, examples: str) -> str:
    """What the model is asked."""
    parts = {"question": example.question, "thought_process": thoughts.strip(), "examples": examples}
    text = prompt_text(name)
    pieces = text.replace("{", "\0{").replace("}", "}\0").split("\0")  # one pass: a question may hold {examples}
    return "".join(parts.get(piece.strip("{}"), piece) if piece.startswith("{") else piece for piece in pieces)


class Refiner:
    """Sends thoughts through the prompts, one after the other."""

    def __init__(self, cfg: CurateConfig, replies: Replies) -> None:
        """
        Raises:
            ValueError: a URL is none, or an API key is not set.
        """
        assert cfg.refine is not None
        self._cfg, self._refine, self._chat = cfg, cfg.refine, KeptChat(cfg.refine.server, replies)
        path = cfg.refine.examples
        self._examples = path.read_text(encoding="utf-8").rstrip() + "\n\n" if path is not None else ""

    def refine(self, example: Example) -> Example:
        """The example, rewritten; `broken` says why it could not be.

        Raises:
            ModelServersError: the servers do not reply.
        """
        split = split_thoughts(example.messages[-1]["content"])
        thoughts, summary = split.thoughts, split.rest
        if thoughts is None or split.is_open:
            return example  # an answer without thoughts, or what the filters drop for its structure
        for name in self._refine.prompts:
            if name == "translate_thoughts" and not self._is_mixed(thoughts, example.language):
                continue
            reply, problem = self._reply(example, asked(name, example, thoughts, self._examples))
            if problem:
                return replace(example, broken=f"{name}: {problem}")
            thoughts, summary = (thoughts, reply) if name == "summary" else (reply, summary)
            example = example.with_answer(thoughts, summary, name)
        return example

    def _is_mixed(self, thoughts: str, language: str) -> bool:
        share = language_share(thoughts, language)[0] if language else None
        return share is not None and share < self._cfg.language_min

    def _reply(self, example: Example, text: str) -> tuple[str, str]:
        """(what the model replies, "") or ("", why that cannot be used)."""
        messages = [{"role": "user", "content": text}]
        found = self._chat.ask(messages, [example.source, text], {"id": example.source})
        if found["finish"] == "length":
            return "", f"the reply is cut off at {self._refine.server.max_tokens} tokens"
        content = split_thoughts(found["content"]).rest.strip()
        return (content, "") if content else ("", "the reply is blank")


def refined(cfg: CurateConfig, units: list[Unit], work: Path, progress: Progress) -> list[Unit]:
    """Every unit with its examples rewritten and graded again, as files of examples in `work`.

    Raises:
        ValueError: an input is damaged; it is named.
        RuntimeError: the servers are gone, or a reward runs code and too little protects from it. What is answered is
            kept.
    """
    assert cfg.refine is not None
    replies = Replies(cfg.run_dir / CACHE)
    progress.phase("refine")
    try:
        with make_scorer(cfg.refine.rewards) as scorer, ThreadPool(cfg.refine.server.parallel) as threads:
            refiner, written = Refiner(cfg, replies), []
            for number, unit in enumerate(units):
                path = work / f"refined_{number:06d}.parquet"
                rows = read_unit(unit, cfg.summaries)
                write_examples(path, _refined(rows, partial(_one, cfg, refiner), scorer, threads, progress))
                written.append(replace(unit, path=path, kind="examples", part=0, parts=1))
            return written
    finally:
        replies.close()


def _refined(
    rows: Iterator[Example], one: Any, scorer: Scorer, threads: ThreadPool, progress: Progress
) -> Iterator[Example]:
    silent = 0
    while batch := list(islice(rows, BATCH)):
        done: list[Example] = []
        for before, found in zip(batch, threads.imap(one, batch), strict=True):
            progress.advance()
            if isinstance(found, ModelServersError):
                silent += not found.is_refusal
                if silent >= NO_REPLY:
                    raise RuntimeError(
                        f"refine: {silent} rows without a reply, the last: {found}; start it again later"
                    )
                done.append(replace(before, broken=f"no reply: {found}"))
            else:
                silent = 0
                done.append(found)
        yield from _graded(done, scorer)


def _one(cfg: CurateConfig, refiner: Refiner, example: Example) -> Example | ModelServersError:
    if any(find(example, cfg) for _, find in BEFORE_REFINING):
        return example
    try:
        return refiner.refine(example)
    except ModelServersError as error:
        return error


def _graded(examples: list[Example], scorer: Scorer) -> list[Example]:
    """Samples that have been rewritten, held to their reference again; only what is right stays so."""
    places = [i for i, example in enumerate(examples) if _is_new(example)]
    records = []
    for i in places:
        task = examples[i].task
        assert task is not None
        records.append(Record(task, examples[i].messages[-1]["content"], "", examples[i].source))
    graded = list(examples)
    for i, score in zip(places, scorer.score(records) if records else [], strict=True):
        if score.verdict != "right":
            graded[i] = replace(examples[i], broken=f"{score.verdict} afterwards: {score.reason}")
    return graded


def _is_new(example: Example) -> bool:
    """Whether a sample that was right has another text."""
    edited = any(editor != "human" for editor in example.edited_by)
    return example.task is not None and edited and not example.broken and example.verdict == "right"
