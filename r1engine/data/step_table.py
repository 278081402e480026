"""Solutions with labelled steps as tokens: rendered and tokenized once, then mapped from disk by every rank."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from r1engine.config.process import ProcessRewardConfig
from r1engine.data.chat import Message, PromptFormat
from r1engine.data.steps import StepRow, read_steps
from r1engine.data.stream import file_digest
from r1engine.data.token_files import DROPPED, TokenFiles, TokenWriter, cached, of_length, of_marker
from r1engine.hf.tokenizer import PromptTokenizer

FORMAT = 1  # of the files, and of how solutions become tokens
BATCH = 128  # solutions tokenized at once


class LabelledSteps(NamedTuple):
    """A solution behind its question."""

    tokens: list[int]
    last: list[int]  # of each step: index in `tokens` of its last one
    labels: list[float]  # of each step, in [0, 1]; nan: unknown


class StepTable(TokenFiles):
    """The solutions that `cached_steps` wrote."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of `folder`."""
        super().__init__(folder)
        self._step_ends = np.load(folder / "step_ends.npy", mmap_mode="r")  # [N + 1], of each solution in the next two
        self._last = np.load(folder / "last.npy", mmap_mode="r")  # [steps] index in the solution's tokens
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")  # [steps] float32, nan: unknown
        self.of_rollouts: float = float(np.load(folder / "of_rollouts.npy"))  # share of the solutions

    def __len__(self) -> int:
        return len(self._step_ends) - 1

    def at(self, index: int) -> LabelledSteps:
        """A solution."""
        a, b = self._ends[index : index + 2].tolist()
        steps = slice(*self._step_ends[index : index + 2].tolist())
        return LabelledSteps(self._tokens[a:b].tolist(), self._last[steps].tolist(), self.labels[steps].tolist())

    def lengths(self) -> np.ndarray:
        """[N] int64, tokens of each solution with its question."""
        return np.diff(self._ends)


def learned(labels: list[float], after_error: str) -> list[int]:
    """Indices of the steps of a solution that are trained on: labelled, and not behind a first 0 with `drop`."""
    known = [index for index, label in enumerate(labels) if not math.isnan(label)]
    first = next((index for index in known if labels[index] == 0), len(labels))
    return known if after_error == "keep" else [index for index in known if index <= first]


def steps_key(path: Path, form: PromptFormat, cfg: ProcessRewardConfig) -> str:
    """Digest of all that the tokens depend on: data, tokenizer, template and settings (hex)."""
    parts = [FORMAT, file_digest(path), file_digest(cfg.model.folder / "tokenizer.json"), form.identity]
    parts += [cfg.steps.marks, cfg.data.max_tokens, cfg.data.max_dropped]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cached_steps(
    path: Path, cache: Path, key: str, form: PromptFormat, tokenizer: PromptTokenizer, cfg: ProcessRewardConfig
) -> Path:
    """The folder below `cache` with the tokens of a file, for `StepTable`; written if it is not there yet.

    A step's tokens are those of the row, if the tokenizer reads the step's text in them; else the step is tokenized by
    itself, with the first mark behind it where it holds none and another step follows.

    Args:
        path:      see `read_steps`.
        cache:     folder of folders, one a key.
        key:       see `steps_key`.
        form:      how a question becomes a prompt.
        tokenizer: of the model.
        cfg:       marks, and which rows may be left out.

    Raises:
        ValueError: a row is not as it must be, more rows than `max_dropped` cannot be used, or none is left.
    """
    return cached(cache, key, lambda folder: _write(path, folder, form, tokenizer, cfg))


def _write(path: Path, folder: Path, form: PromptFormat, tokenizer: PromptTokenizer, cfg: ProcessRewardConfig) -> None:
    with (folder / "tokens").open("wb") as tokens, (folder / DROPPED).open("w") as dropped:
        written = _WrittenSteps(form, tokenizer, cfg, tokens, dropped)
        rows = read_steps(path)
        while batch := list(islice(rows, BATCH)):
            written.add(batch)
    written.save(folder, written.left_out(path, "solutions", cfg.data.max_dropped))
    written.save_steps(folder)


class _WrittenSteps(TokenWriter):
    """Solutions of a file, tokenized as they come."""

    def __init__(
        self,
        form: PromptFormat,
        tokenizer: PromptTokenizer,
        cfg: ProcessRewardConfig,
        tokens: BinaryIO,
        dropped: TextIO,
    ) -> None:
        super().__init__(tokens, dropped)
        self._form, self._tokenizer, self._cfg = form, tokenizer, cfg
        self._step_ends, self._last, self._labels = array("q", [0]), array("i"), array("f")
        self._of_rollouts = 0

    def add(self, rows: list[StepRow]) -> None:
        """Render and tokenize solutions, and write those that can be trained on."""
        kept = []
        for row in rows:
            own = self._own(row)
            messages: list[Message] = [{"role": "user", "content": row.question}]
            if own is None:  # drawn tokens are what they are
                messages.append({"role": "assistant", "content": "".join(row.steps)})
            if marker := self._form.marker(messages):
                self.drop(row.place, *of_marker(marker))
            elif all(label is None for label in row.labels):
                self.drop(row.place, "have no labelled step", "has no labelled step")
            else:
                kept.append((row, own))
        prompts = self._form.encode_prompts([self._form.prompt(row.question, row.place) for row, _ in kept])
        texts = [[] if own else marked(row.steps, self._cfg.steps.marks) for row, own in kept]
        encoded = iter(self._form.encode_completions(list(chain(*texts))))
        for (row, own), prompt, steps in zip(kept, prompts, texts, strict=True):
            self._take(row, prompt, own or [next(encoded) for _ in steps])

    def _own(self, row: StepRow) -> list[list[int]] | None:
        """The tokens that a row has, if they are of this tokenizer."""
        if row.tokens is None or not all(row.tokens):
            return None
        tokens = [list(step) for step in row.tokens]
        if max(map(max, tokens)) >= self._tokenizer.num_ids:
            return None
        texts = self._tokenizer.decode_batch(tokens, skip_special_tokens=False)
        return tokens if all(a.strip() == b.strip() for a, b in zip(texts, row.steps, strict=True)) else None

    def _take(self, row: StepRow, prompt: list[int], steps: list[list[int]]) -> None:
        whole = [*prompt, *chain(*steps)]
        if len(whole) > self._cfg.data.max_tokens:
            self.drop(row.place, *of_length(len(whole), self._cfg.data.max_tokens))
            return
        self.take([whole], "", row.place)
        end = len(prompt)
        for step, label in zip(steps, row.labels, strict=True):
            end += len(step)
            self._last.append(end - 1)
            self._labels.append(math.nan if label is None else label)
        self._step_ends.append(len(self._last))
        self._of_rollouts += row.is_of_rollouts

    def save_steps(self, folder: Path) -> None:
        """Write where the steps end, and their labels."""
        np.save(folder / "step_ends.npy", np.array(self._step_ends, np.int64))
        np.save(folder / "last.npy", np.array(self._last, np.int32))
        np.save(folder / "labels.npy", np.array(self._labels, np.float32))
        np.save(folder / "of_rollouts.npy", np.float64(self._of_rollouts / (len(self._step_ends) - 1)))


def marked(steps: tuple[str, ...], marks: list[str]) -> list[str]:
    """Steps with the first mark behind those that hold none, but for the last one."""
    return [
        step if index == len(steps) - 1 or any(mark in step for mark in marks) else step + marks[0]
        for index, step in enumerate(steps)
    ]
