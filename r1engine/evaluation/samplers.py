"""Who draws the replies of an evaluation: a folder's model in this process, or a server (endpoint.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from r1engine.batch import Prompt
from r1engine.config import Data
from r1engine.config.evaluation import Suite
from r1engine.data.chat import THINK, PromptFormat, make_format
from r1engine.evaluation.entries import Ask
from r1engine.evaluation.lines import SampleLine
from r1engine.hf.architecture import Architecture, read_architecture
from r1engine.hf.folder import weights_of
from r1engine.hf.formats import model_dtype
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rollout.draft import Draft, Sampling
from r1engine.rollout.generator import Generator
from r1engine.rollout.local.generator import LocalGenerator

OnReply = Callable[[Ask, SampleLine], None]


class Sampler(Protocol):
    """Draws replies."""

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        """Draw a reply to each of `asks`.

        Args:
            asks:      those of one question follow each other.
            on_reply:  called with each reply as it ends, from one thread at a time.
            on_tokens: called with the number of tokens of each part that is drawn.

        Raises:
            ValueError: a question cannot be shown to this model.
            RuntimeError: nobody draws any more; what ended before was handed over.
        """

    def close(self) -> None:
        """Stop what was started."""


@dataclass(frozen=True)
class Shown:
    """A question as the model is shown it."""

    text: str
    tokens: list[int]

    @property
    def opened(self) -> str:
        """The thoughts' tag that the prompt opens, to stand in front of the reply; "" if it opens none."""
        return self.text[self.text.rindex(THINK) :] if self.text.rstrip().endswith(THINK) else ""


class Shows:
    """Writes questions in a template, each text once."""

    def __init__(self, form: PromptFormat) -> None:
        self._form, self._known = form, dict[str, Shown]()

    def all(self, asks: Sequence[Ask]) -> list[Shown]:
        """Each as the model is shown it.

        Raises:
            ValueError: a question holds a token of the template; its place is named.
        """
        texts = [ask.text for ask in asks]
        fresh: dict[str, str] = {}
        for ask, text in zip(asks, texts, strict=True):
            if text not in self._known and text not in fresh:
                fresh[text] = self._form.prompt(text, ask.place)
        tokens = self._form.encode_prompts(list(fresh.values())) if fresh else []
        for (text, prompt), ids in zip(fresh.items(), tokens, strict=True):
            self._known[text] = Shown(prompt, ids)
        return [self._known[text] for text in texts]


def shows_of(folder: Path, suite: Suite) -> Shows:
    """How the suite shows questions to the model of a folder.

    Raises:
        ValueError: the folder has no tokenizer, no end token or no such template.
    """
    data = Data(template=suite.template or "chat", system=suite.system, think=suite.think)
    try:
        return Shows(make_format(folder, load_tokenizer(folder), data))
    except ValueError as error:
        raise ValueError(f"template: {error}" if suite.template is None else str(error)) from error


def room_for(arch: Architecture, prompt: int, max_tokens: int) -> int:
    """Tokens that a reply may have: the suite's limit, or what the context leaves behind the prompt; 0: nothing."""
    return max(0, min(max_tokens, arch.max_positions - prompt))


def too_long(ask: Ask, shown: Shown) -> SampleLine:
    """The reply to a prompt that fills the context: cut before its first token."""
    return SampleLine(ask.item.id, ask.sample, "", 0, "length", len(shown.tokens), ask.seed, 0.0)


def drafts_of(
    asks: Sequence[Ask], shows: Shows, arch: Architecture, max_tokens: int, on_reply: OnReply
) -> list[tuple[Draft, Ask, Shown]]:
    """What a generator is to draw; a prompt that fills the context is answered at once by `too_long`.

    Raises:
        ValueError: as of `Shows.all`.
    """
    drafts = []
    for ask, shown in zip(asks, shows.all(asks), strict=True):
        if room := room_for(arch, len(shown.tokens), max_tokens):
            prompt = Prompt(ask.seed, shown.tokens, shown.text, ask.item.question)
            drafts.append((Draft(prompt, ask.sample, step=-1, stream=0, max_tokens=room), ask, shown))
        else:
            on_reply(ask, too_long(ask, shown))
    return drafts


def draw_replies(
    generator: Generator,
    made: Sequence[tuple[Draft, Ask, Shown]],
    sampling: Sampling,
    on_reply: OnReply,
    on_tokens: Callable[[int], None],
) -> None:
    """Draws what `drafts_of` made and hands each reply over as it ends; `generator` is awake.

    Raises:
        RuntimeError: nobody draws any more; what ended before was handed over.
    """
    began = {id(draft): (ask, shown) for draft, ask, shown in made}
    started = time.monotonic()

    def ended(draft: Draft) -> None:
        ask, shown = began[id(draft)]
        assert draft.finish in ("stop", "length")  # no steps are asked for
        text = shown.opened + generator.completions([draft])[0].text
        seconds, count = round(time.monotonic() - started, 3), len(draft.tokens)
        draft.tokens, draft.logp, draft.experts = [], [], None  # of a large suite they would fill the memory
        line = SampleLine(ask.item.id, ask.sample, text, count, draft.finish, len(shown.tokens), ask.seed, seconds)
        on_reply(ask, line)

    generator.draw([draft for draft, *_ in made], sampling, on_tokens=on_tokens, on_ended=ended)


class LocalSampler:
    """A folder's model in this process, with the generator that draws a run's rollouts."""

    def __init__(self, folder: Path, suite: Suite, device: torch.device) -> None:
        """
        Raises:
            ValueError: the folder is incomplete, or its model is not one that is computed here.
        """
        dtype = model_dtype(suite.dtype, device)
        self._suite, self._shows = suite, shows_of(folder, suite)
        self.arch = read_architecture(folder)
        self._generator = LocalGenerator(folder, seed=suite.seed, slots=suite.slots, device=device, dtype=dtype)
        self._generator.load_weights(weights_of(folder))

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        """See `Sampler.draw`."""
        made = drafts_of(asks, self._shows, self.arch, self._suite.max_tokens, on_reply)
        with self._generator.awake():
            sampling = Sampling(self._suite.temperature, self._suite.top_p)
            draw_replies(self._generator, made, sampling, on_reply, on_tokens)

    def close(self) -> None:
        """Nothing to stop."""
