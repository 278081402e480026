"""Texts of supervised training: rendered and tokenized once, then mapped from disk by every rank.

800 thousand conversations of 5,400 tokens are 17 GB of tokens; in memory are four numbers a text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from r1engine.config.sft import TextData
from r1engine.data.chat import PromptFormat, Text
from r1engine.data.conversations import read_conversations
from r1engine.data.stream import file_digest

FORMAT = 2  # of the files, and of how texts become tokens
BATCH = 128  # texts tokenized at once
LISTED = 5  # texts that are left out and named in a message; all stand in DROPPED
DROPPED = "dropped.jsonl"
MOST_DOMAINS = 100  # of a file: each is a key of the log
TOO_LONG = "too long"


class TextTable:
    """Token ids of the texts that `cached_texts` wrote."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of `folder`."""
        about = json.loads((folder / "about.json").read_text())
        self.longest: int = about["longest"]  # tokens of the longest text
        self.longest_at: str = about["longest_at"]  # where it stands
        self.largest_token: int = about["largest_token"]
        self.largest_token_at: str = about["largest_token_at"]  # where the first text with it stands
        self.left_out: str = about["left_out"]  # which texts and why
        self.notes = [f"left out, listed in {folder / DROPPED}: {self.left_out}"] if self.left_out else []
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")  # of each text, behind a 0
        self._num_prompt = np.load(folder / "num_prompt.npy", mmap_mode="r")
        self.domains: list[str] = about["domains"]  # in the order of the file; "" where a row names none
        self._domain = np.load(folder / "domain.npy", mmap_mode="r")
        self._tokens = np.memmap(folder / "tokens", np.int32, "r")

    def __len__(self) -> int:
        return len(self._num_prompt)

    def at(self, index: int) -> tuple[list[int], int]:
        """(tokens of a text with its end token, how many of them are the prompt)."""
        start, end = self._ends[index : index + 2].tolist()
        return self._tokens[start:end].tolist(), int(self._num_prompt[index])

    def of_domain(self, domain: str) -> list[int]:
        """The texts of one of `domains`."""
        return np.flatnonzero(self._domain == self.domains.index(domain)).tolist()

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
    parts += [data.train_on, data.max_tokens, data.max_dropped]
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
    folder = cache / key[:16]
    if not folder.is_dir():
        partial = cache / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_texts(path, partial, form, data)
        os.replace(partial, folder)
    return folder


def _write_texts(path: Path, folder: Path, form: PromptFormat, data: TextData) -> None:
    with (folder / "tokens").open("wb") as tokens, (folder / DROPPED).open("w") as dropped:
        written = _Written(form, data, tokens, dropped)
        texts = _texts(path, form, data, written.drop)
        while batch := list(islice(texts, BATCH)):
            written.add(batch)
    left_out = written.left_out(path)
    np.save(folder / "ends.npy", np.array(written.ends, np.int64))
    np.save(folder / "num_prompt.npy", np.array(written.num_prompt, np.int32))
    np.save(folder / "domain.npy", np.array(written.domain, np.int16))
    names = ("longest", "longest_at", "largest_token", "largest_token_at")
    about = {name: getattr(written, name) for name in names} | {"left_out": left_out}
    about["domains"] = list(written.domains)
    (folder / "about.json").write_text(json.dumps(about))


def _texts(
    path: Path, form: PromptFormat, data: TextData, drop: Callable[[str, str, str], None]
) -> Iterator[tuple[Text, str]]:
    """The texts of a file but those that hold a marker, and the domain of each."""
    for conversation in read_conversations(path):
        for messages in conversation.until(train_on=data.train_on):
            if marker := form.marker(messages):
                drop(conversation.place, marker, f"holds {marker}")
            else:
                yield form.text(messages, conversation.place), conversation.domain


class _Written:
    """What is in memory of a file that is written: three numbers a text, and what was left out."""

    def __init__(self, form: PromptFormat, data: TextData, tokens: BinaryIO, dropped: TextIO) -> None:
        self._form, self._data, self._tokens, self._dropped = form, data, tokens, dropped
        self.ends, self.num_prompt, self.domain = array("q", [0]), array("i"), array("h")
        self.domains: dict[str, int] = {}
        self.longest, self.largest_token, self.longest_at, self.largest_token_at = 0, -1, "", ""
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []  # of those that were left out

    def drop(self, place: str, reason: str, words: str) -> None:
        """Leave a text out."""
        self.reasons[reason] += 1
        self._dropped.write(json.dumps({"place": place, "reason": words}) + "\n")
        if len(self.first) < LISTED:
            self.first.append(f"{place} {words}")

    def left_out(self, path: Path) -> str:
        """How many texts are left out and why, "" for none; ValueError if they are too many."""
        count = sum(self.reasons.values())
        if not count:
            return ""
        total, data = count + len(self.num_prompt), self._data
        reasons = [
            f"{n:,} have more than data.max_tokens = {data.max_tokens:,} tokens"
            if reason == TOO_LONG
            else f"{n:,} hold {reason}, a token of the template or a special one"
            for reason, n in self.reasons.most_common()
        ]
        problem = f"{path}: {count:,} of {total:,} texts ({count / total:.1%}): {'; '.join(reasons)}"
        problem += f" ({'; '.join(self.first)}{' and others' if count > LISTED else ''})"
        if count == total or count > data.max_dropped * total:
            raise ValueError(f"{problem}; at most data.max_dropped = {data.max_dropped:.1%} may be left out")
        return problem

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
                self.drop(text.place, TOO_LONG, f"has {size} tokens")
                continue
            tokens = np.array([*prompt, *completion, self._form.end_token], np.int32)
            self._tokens.write(tokens.tobytes())
            self.ends.append(self.ends[-1] + size)
            self.num_prompt.append(len(prompt))
            self.domain.append(self._number(domain, text.place))
            if size > self.longest:
                self.longest, self.longest_at = size, text.place
            if (largest := int(tokens.max())) > self.largest_token:
                self.largest_token, self.largest_token_at = largest, text.place

    def _number(self, domain: str, place: str) -> int:
        number = self.domains.setdefault(domain, len(self.domains))
        if number >= MOST_DOMAINS:
            raise ValueError(f"{place}: domain is '{domain}', one more than the {MOST_DOMAINS} that a file may name")
        return number


def _encoded(texts: list[str], encode: Callable[[list[str]], list[list[int]]]) -> dict[str, list[int]]:
    """Token ids of each distinct text."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode(distinct), strict=True))
