"""Texts of supervised training: rendered and tokenized once, then mapped from disk by every rank.

800 thousand conversations of 5,400 tokens are 17 GB of tokens; in memory are four numbers a text.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from r1engine.config.sft import TextData
from r1engine.data.chat import PromptFormat, Text
from r1engine.data.conversations import read_conversations
from r1engine.data.reading import Reading
from r1engine.data.stream import file_digest
from r1engine.data.token_files import DROPPED, TokenFiles, TokenWriter, cached, of_length, of_marker

FORMAT = 2  # of the files, and of how texts become tokens
BATCH = 128  # texts tokenized at once


class TextTable(TokenFiles):
    """Token ids of the texts that `cached_texts` wrote."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of `folder`."""
        super().__init__(folder)
        self._num_prompt = np.load(folder / "num_prompt.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._num_prompt)

    def at(self, index: int) -> tuple[list[int], int]:
        """(tokens of a text with its end token, how many of them are the prompt)."""
        start, end = self._ends[index : index + 2].tolist()
        return self._tokens[start:end].tolist(), int(self._num_prompt[index])

    def of_domain(self, domain: str) -> list[int]:
        """The texts of one of `domains`."""
        return np.flatnonzero(self.domain == self.domains.index(domain)).tolist()

    def lengths(self) -> np.ndarray:
        """Tokens of each text, [N] int64."""
        return np.diff(self._ends)

    @property
    def num_tokens(self) -> int:
        """Of all texts."""
        return int(self._ends[-1])

    @property
    def num_trained(self) -> int:
        """Of all completions, end tokens included."""
        return self.num_tokens - int(self._num_prompt.sum(dtype=np.int64))


def texts_key(path: Path, form: PromptFormat, data: TextData, tokenizer_json: Path) -> str:
    """Digest of all that the tokens depend on: data, tokenizer, template and settings (hex)."""
    parts = [FORMAT, file_digest(path), file_digest(tokenizer_json), form.identity, form.end_token]
    parts += [data.train_on, data.max_tokens, data.max_dropped, *sorted(data.columns.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cached_texts(path: Path, cache: Path, key: str, form: PromptFormat, data: TextData) -> Path:
    """The folder below `cache` with the tokens of a file, for `TextTable`; written if it is not there yet.

    Args:
        path:  .jsonl or .parquet file, see `read_conversations`.
        cache: folder of folders, one a key.
        key:   see `texts_key`.
        form:  how a conversation becomes a prompt and a completion.
        data:  which turns are trained on, the longest text, and how many may be left out.

    Raises:
        ValueError: a row is no conversation or cannot be written in the template; more texts than `max_dropped` are too
            long or hold a marker; none is left; or the rows name more than MOST_DOMAINS domains.
    """
    return cached(cache, key, lambda folder: _write_texts(path, folder, form, data))


def _write_texts(path: Path, folder: Path, form: PromptFormat, data: TextData) -> None:
    with (folder / "tokens").open("wb") as tokens, (folder / DROPPED).open("w") as dropped:
        written = _Written(form, data, tokens, dropped)
        texts = _texts(path, form, data, written.drop)
        while batch := list(islice(texts, BATCH)):
            written.add(batch)
    written.save(folder, written.left_out(path, "texts", data.max_dropped))
    np.save(folder / "num_prompt.npy", np.array(written.num_prompt, np.int32))


def _texts(
    path: Path, form: PromptFormat, data: TextData, drop: Callable[[str, str, str], None]
) -> Iterator[tuple[Text, str]]:
    """The texts of a file but those that hold a marker, and the domain of each."""
    for conversation in read_conversations(path, Reading(data.columns)):
        for messages in conversation.until(train_on=data.train_on):
            if marker := form.marker(messages):
                drop(conversation.place, *of_marker(marker))
            else:
                yield form.text(messages, conversation.place), conversation.domain


class _Written(TokenWriter):
    """Texts of a file, tokenized as they come."""

    def __init__(self, form: PromptFormat, data: TextData, tokens: BinaryIO, dropped: TextIO) -> None:
        super().__init__(tokens, dropped)
        self._form, self._data, self.num_prompt = form, data, array("i")

    def add(self, texts: list[tuple[Text, str]]) -> None:
        """Tokenize texts, each with its domain, and write those that are not too long."""
        prompts = _encoded([text.prompt for text, _ in texts], self._form.encode_prompts)
        completions = _encoded([text.completion for text, _ in texts], self._form.encode_completions)
        for text, domain in texts:
            prompt, completion = prompts[text.prompt], completions[text.completion]
            size = len(prompt) + len(completion) + 1
            if not prompt:
                raise ValueError(f"{text.place}: the prompt has no tokens, required at least one")
            if size > self._data.max_tokens:
                self.drop(text.place, *of_length(size, self._data.max_tokens))
                continue
            self.take([[*prompt, *completion, self._form.end_token]], domain, text.place)
            self.num_prompt.append(len(prompt))


def _encoded(texts: list[str], encode: Callable[[list[str]], list[list[int]]]) -> dict[str, list[int]]:
    """Token ids of each distinct text."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode(distinct), strict=True))
