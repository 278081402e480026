"""What is left out of the data of supervised training: one function a reason, from one row alone, in order.

Section 2.3.3 leaves out "chain-of-thought with mixed languages, long paragraphs, and code blocks" and retains "only the
correct" responses; v2 B.3.2 adds repetition. The paper gives no thresholds: config/curate.py marks ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from r1engine.config.curate import CurateConfig
from r1engine.config.stage import Data
from r1engine.data.chat import END_THINK, THINK, make_format
from r1engine.data.contamination import units
from r1engine.data.examples import Example
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rewards.format import TAGS
from r1engine.rewards.language import language_share
from r1engine.rewards.shaping import repetition_term
from r1engine.rewards.thoughts import split_thoughts

_FENCE = re.compile(r"```|^~~~", re.MULTILINE)


class Dropped(NamedTuple):
    """Why a row is left out."""

    reason: str
    detail: str = ""


class Target:
    """How the model that will be trained sees a row: which tokens would end a turn inside of it, and its length."""

    def __init__(self, folder: Path, data: Data) -> None:
        """
        Raises:
            ValueError: the folder has no tokenizer, or the template cannot be used.
        """
        self._form = make_format(folder, load_tokenizer(folder), data)
        self.identity = self._form.identity

    def marker(self, example: Example) -> str:
        """A token of the template, or a special one, in any text of the row; "" if there is none."""
        return self._form.marker(example.messages)

    def num_tokens(self, example: Example) -> int:
        """Tokens of the row as it is trained on, with its end token.

        Of a sample whose text is that of the model the tokens that were drawn count, behind those of the prompt.

        Raises:
            ValueError: the template does not write the row as it is.
        """
        text = self._form.text(example.messages, example.source)
        num_prompt = len(self._form.encode_prompts([text.prompt])[0])
        if example.task is not None and example.num_tokens is not None:
            return num_prompt + example.num_tokens
        return num_prompt + len(self._form.encode_completions([text.completion])[0]) + 1


def target_of(cfg: CurateConfig) -> Target | None:
    """The model that the configuration names; None: it names none."""
    if cfg.model.path is None:
        return None
    return Target(cfg.model.path, Data(template=cfg.model.template))


def _truncated(example: Example, _: CurateConfig) -> str:
    return "" if example.finish == "stop" else f"finish is {example.finish}"


def _wrong(example: Example, _: CurateConfig) -> str:
    return example.why or "no reason is given" if example.verdict == "wrong" else ""


def _undecided(example: Example, _: CurateConfig) -> str:
    return "" if example.verdict in ("right", "wrong") else example.why or f"the verdict is {example.verdict}"


def _refining(example: Example, _: CurateConfig) -> str:
    return example.broken


def structure_problem(answer: str, *, needs_thoughts: bool) -> str:
    """What is wrong with `<think>thoughts</think>\\nsummary`; "" if nothing is, or for an answer without any tag."""
    counts = {tag: answer.count(tag) for tag in TAGS}
    if not any(counts.values()):
        return "no thoughts" if needs_thoughts else "" if answer.strip() else "a blank answer"
    if wrong := [f"{count} x {tag}" for tag, count in counts.items() if count != (tag in (THINK, END_THINK))]:
        return ", ".join(wrong)
    split = split_thoughts(answer)
    if split.is_open or not answer.lstrip().startswith(THINK):
        return "the thoughts are not one block at the beginning"
    blank = [name for name, text in (("thoughts", split.thoughts), ("summary", split.rest)) if not (text or "").strip()]
    return f"blank {' and '.join(blank)}" if blank else ""


def _structure(example: Example, _: CurateConfig) -> str:
    last = len(example.answers) - 1
    for i, answer in enumerate(example.answers):
        if problem := structure_problem(answer, needs_thoughts=example.needs_thoughts and i == last):
            return problem
    return ""


def _mixed_languages(example: Example, cfg: CurateConfig) -> str:
    """Thoughts without words are in no wrong language, and neither are those of a question without."""
    for thoughts in example.thoughts if example.language else []:
        share, _, found = language_share(thoughts, example.language)
        if share is not None and share < cfg.language_min:
            words = ", ".join(f"{count} {name}" for name, count in found.items() if name != example.language)
            return f"{share:.3f} of the words are {example.language}; also {words}"
    return ""


def _long_paragraph(example: Example, cfg: CurateConfig) -> str:
    limit = cfg.max_paragraph
    if limit is None:
        return ""
    for line in (line for thoughts in example.thoughts for line in thoughts.splitlines() if len(line) > limit):
        if (found := len(units(line))) > limit:
            return f"{found} words in {line[:60]!r}..."
    return ""


def _code(example: Example, cfg: CurateConfig) -> str:
    found = next((match for text in example.thoughts if (match := _FENCE.search(text))), None)
    return "" if found is None or cfg.code_in_thoughts else f"fenced code behind {found.start():,} characters"


def repeated_share(text: str, size: int) -> float:
    """Share of the n-grams of a text that occurred before."""
    return -repetition_term(text, size)


def _repetition(example: Example, cfg: CurateConfig) -> str:
    for thoughts in example.thoughts:
        if (share := repeated_share(thoughts, cfg.repetition_ngram)) > cfg.repetition_max:
            return f"{share:.3f} of the {cfg.repetition_ngram}-grams occurred before"
    return ""


# In the order in which a row meets them.
FILTERS: tuple[tuple[str, Callable[[Example, CurateConfig], str]], ...] = (
    ("truncated", _truncated),
    ("wrong", _wrong),
    ("undecided", _undecided),
    ("refining broke it", _refining),
    ("structure", _structure),
    ("mixed languages", _mixed_languages),
    ("long paragraph", _long_paragraph),
    ("code in thoughts", _code),
    ("repetition", _repetition),
)
BEFORE_REFINING = FILTERS[:3]
MARKER, TEMPLATE, TOO_LONG = "marker of the template", "not in the template", "too long"
SAME, CONTAMINATED, ONE_OF_MANY, NOT_MIXED = (
    "same thoughts",
    "contaminated",
    "question has others",
    "not in the mixture",
)
REASONS = (*(name for name, _ in FILTERS), MARKER, TEMPLATE, TOO_LONG, SAME, CONTAMINATED, ONE_OF_MANY, NOT_MIXED)


def problem_of(example: Example, cfg: CurateConfig) -> Dropped | None:
    """The first reason in `FILTERS` to leave a row out; None: it stays."""
    for name, find in FILTERS:
        if detail := find(example, cfg):
            return Dropped(name, detail)
    return None


def measured(example: Example, cfg: CurateConfig, target: Target | None) -> int | Dropped:
    """Tokens of a row that passed `FILTERS`, or why it is left out: a marker of the template, or its length.

    Raises:
        ValueError: nothing tells its length.
    """
    if target is None:
        if example.num_tokens is None:
            edited = f" behind {', '.join(example.edited_by)}" if example.edited_by else ""
            raise ValueError(
                f"{example.source}: found no num_tokens{edited}; required is model.path, whose tokenizer counts them"
            )
        size = example.num_tokens
    else:
        if marker := target.marker(example):
            return Dropped(MARKER, f"holds {marker}")
        try:
            size = target.num_tokens(example)
        except ValueError as error:
            return Dropped(TEMPLATE, str(error))
    return size if size <= cfg.max_tokens else Dropped(TOO_LONG, f"{size:,} tokens")
