"""`r1engine generate`: samples of a model for a file of prompts, or a conversation in the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from r1engine.batch import Completion, Prompt
from r1engine.config import Data
from r1engine.data.chat import ChatFormat, Message, PromptFormat, make_format
from r1engine.data.question import Question
from r1engine.data.rows import read_rows
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import weights_of
from r1engine.hf.formats import model_dtype
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer
from r1engine.rewards.thoughts import CLOSING, OPENING
from r1engine.rollout.draft import new_drafts
from r1engine.rollout.generator import generate
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.verbs.wanted import Wanted

SHOWN_EVERY = 16  # tokens of a conversation that are drawn before they are shown


class Speaker:
    """A Hugging Face folder that answers: its format, its tokenizer and a generator with its weights."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        """
        Raises:
            ValueError: the folder is no whole model of a supported family, or has no such template.
        """
        folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder  # of a run
        self.arch, self.wanted = read_architecture(folder), wanted
        self.tokenizer = load_tokenizer(folder)
        self.form = _format(folder, self.tokenizer, wanted)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = model_dtype("auto", device)
        self.generator = LocalGenerator(folder, seed=wanted.seed, slots=32, device=device, dtype=dtype)
        self.generator.load_weights(weights_of(folder))

    def prompt(self, messages: list[Message], number: int, place: str) -> Prompt:
        """A conversation that ends with the user, as a prompt; without a chat template it is the last question."""
        if isinstance(self.form, ChatFormat):
            text = self.form.conversation(messages, place)
        else:
            text = self.form.prompt(messages[-1]["content"], place)
        (tokens,) = self.form.encode_prompts([text])
        return Prompt(number, list(tokens), text, Question(messages[-1]["content"], place=place))

    def draw(self, prompts: list[Prompt]) -> list[Completion]:
        """The samples, prompt after prompt."""
        room = self.arch.max_positions - max(len(prompt.tokens) for prompt in prompts)
        if room < 1:
            raise ValueError(f"generate: found a prompt that fills the model's {self.arch.max_positions} positions")
        return generate(
            self.generator,
            prompts,
            num_samples=self.wanted.samples,
            step=0,
            max_tokens=min(self.wanted.max_tokens, room),
            sampling=self.wanted.sampling,
        )

    def tell(self, prompt: Prompt) -> Iterator[str]:
        """One sample, a piece of text after the other, as it is drawn."""
        room = self.arch.max_positions - len(prompt.tokens)
        drafts = new_drafts([prompt], num_samples=1, step=0, max_tokens=min(self.wanted.max_tokens, max(1, room)))
        shown = ""
        while not drafts[0].finish:
            self.generator.draw(drafts, self.wanted.sampling, should_stop=_after(SHOWN_EVERY))
            text = self.tokenizer.decode(drafts[0].tokens)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                yield text[len(shown) :]
                shown = text
        yield self.generator.completions(drafts)[0].text[len(shown) :]


def _after(count: int) -> Callable[[], bool]:
    """False so many times, then True."""
    left = count

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    return is_over


def _format(folder: Path, tokenizer: PromptTokenizer, wanted: Wanted) -> PromptFormat:
    template = wanted.template
    if template is None:
        template = "chat" if _has_chat_template(folder) else "r1_zero"
    return make_format(folder, tokenizer, Data(template=template, system=wanted.system))


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
    )


def write_samples(speaker: Speaker, source: Path, out: Path, column: str, console: Console) -> int:
    """Samples of every row of a data file, one JSON line each: the row, then prompt, completion, num_tokens, truncated
    and id. `r1engine reward` grades the file. Returns the number of lines.

    Raises:
        ValueError: the file or a row is not as it should be.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: found the input itself, required another file")
    prompts, rows = [], []
    for number, row in enumerate(read_rows(source, (column, "answer"), every_column=True)):
        text = row.fields.get(column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{row.place}: {column} is {text!r:.60}, required a text; choose another by --column")
        prompts.append(speaker.prompt([{"role": "user", "content": text}], number, row.place))
        rows.append(row.fields | {"question": text})
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, size, count = out.with_name(out.name + ".partial"), max(1, 64 // speaker.wanted.samples), 0
    with partial.open("w", encoding="utf-8") as file, Progress(console=console, transient=True) as progress:
        for start in progress.track(range(0, len(prompts), size), description="generate"):
            for completion in speaker.draw(prompts[start : start + size]):
                file.write(json.dumps(_line(rows[completion.prompt.id], completion), default=str) + "\n")
                count += 1
    os.replace(partial, out)
    return count


def _line(row: dict[str, Any], completion: Completion) -> dict[str, Any]:
    return {
        "reward": "math",
        **row,
        "id": f"{completion.prompt.id}/{completion.sample}",
        "prompt": completion.prompt.text,
        "completion": completion.text,
        "num_tokens": len(completion.tokens),
        "truncated": completion.truncated,
    }


def converse(speaker: Speaker, console: Console, ask: Callable[[], str]) -> None:
    """Answers what `ask` returns until it raises EOFError. Thoughts are dimmed; an empty line begins anew.

    Without a chat template every question stands alone.
    """
    messages: list[Message] = []
    while True:
        try:
            question = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            messages = []
            console.print("(a new conversation)", style="dim")
            continue
        turn: list[Message] = [*messages, {"role": "user", "content": question}]
        try:
            prompt = speaker.prompt(turn, len(turn), "your question")
        except ValueError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            continue
        said = _show(speaker, prompt, console)
        messages = [*turn, {"role": "assistant", "content": said}] if isinstance(speaker.form, ChatFormat) else []


def _show(speaker: Speaker, prompt: Prompt, console: Console) -> str:
    """Prints an answer as it comes; Ctrl-C ends it."""
    said = ""
    try:
        for piece in speaker.tell(prompt):
            before, said = said, said + piece
            for text, is_thought in _parts(said, len(before), prompt.text):
                console.print(text, end="", style="dim" if is_thought else None, markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    console.print()
    return said


def _parts(said: str, start: int, prompt: str) -> Iterator[tuple[str, bool]]:
    """(text, whether it is thought) of what follows `start`."""
    begins = 0 if prompt.rstrip().endswith(OPENING) else said.find(OPENING)
    ends = said.find(CLOSING)
    ends = len(said) if ends < 0 else ends + len(CLOSING)
    edges = sorted({start, len(said), *(edge for edge in (begins, ends) if start < edge < len(said))})
    for low, high in pairwise(edges):
        yield said[low:high], 0 <= begins <= low < ends
