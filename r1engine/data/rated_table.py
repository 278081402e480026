"""Pairs and labels as tokens: rendered and tokenized once, then mapped from disk by every rank."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from r1engine.config.reward_model import RewardModelConfig
from r1engine.data.chat import PromptFormat
from r1engine.data.comparisons import Comparison, read_comparisons
from r1engine.data.rated import RatedForm, head_of
from r1engine.data.stream import file_digest
from r1engine.rewards.rated import forgery
from r1engine.rewards.servers.preference import summary

FORMAT = 1  # of the files, and of how texts become tokens
BATCH = 128  # rows tokenized at once
LISTED = 5  # rows that are left out and named in a message; all stand in DROPPED
DROPPED = "dropped.jsonl"
MOST_DOMAINS = 100  # of a file: each is a key of the log


class Rated(NamedTuple):
    """One pair or label."""

    texts: list[list[int]]  # token ids of two texts, the better one first, or of one
    value: float  # delta, or 1 (safe) and 0


class RatedTable:
    """The pairs or labels that `cached_ratings` wrote."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of `folder`."""
        about = json.loads((folder / "about.json").read_text())
        self.longest: int = about["longest"]  # tokens of the longest text
        self.longest_at: str = about["longest_at"]  # where it stands
        self.largest_token: int = about["largest_token"]
        self.largest_token_at: str = about["largest_token_at"]
        self.domains: list[str] = about["domains"]  # in the order of the file; "" where a row names none
        self.left_out: str = about["left_out"]  # which rows and why
        self.notes = [f"left out, listed in {folder / DROPPED}: {self.left_out}"] if self.left_out else []
        self._texts_of_unit: int = about["texts_of_unit"]
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")  # of each text, behind a 0
        self.values = np.load(folder / "values.npy", mmap_mode="r")  # [N] float32
        self.domain = np.load(folder / "domain.npy", mmap_mode="r")  # [N] index of `domains`
        self._tokens = np.memmap(folder / "tokens", np.int32, "r")

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: int) -> Rated:
        """A pair or label."""
        k = self._texts_of_unit
        ends = self._ends[k * index : k * index + k + 1].tolist()
        return Rated([self._tokens[a:b].tolist() for a, b in pairwise(ends)], self.values[index])

    def lengths(self) -> np.ndarray:
        """[N, 2 or 1] int64, tokens of the texts of each pair or label."""
        return np.diff(self._ends).reshape(-1, self._texts_of_unit)


def ratings_key(path: Path, form: PromptFormat, rated: RatedForm, cfg: RewardModelConfig) -> str:
    """Digest of all that the tokens depend on: data, tokenizer, template and settings (hex)."""
    parts = [FORMAT, file_digest(path), file_digest(cfg.model.folder / "tokenizer.json"), form.identity, rated.template]
    parts += [cfg.reward_model.loss, cfg.sees, cfg.data.max_tokens, cfg.data.max_dropped]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cached_ratings(
    path: Path, cache: Path, key: str, form: PromptFormat, rated: RatedForm, cfg: RewardModelConfig
) -> Path:
    """The folder below `cache` with the tokens of a file, for `RatedTable`; written if it is not there yet.

    Args:
        path:  .jsonl or .parquet file, see `read_comparisons`.
        cache: folder of folders, one a key.
        key:   see `ratings_key`.
        form:  how a conversation becomes a prompt.
        rated: how prompt and response become tokens.
        cfg:   which kind of rows, what is seen of a response, and which rows may be left out.

    Raises:
        ValueError: a row is not as it must be or cannot be written in the template; more rows than `max_dropped` are
            too long, have equal texts or hold a marker; none is left; or there are more than MOST_DOMAINS domains.
    """
    folder = cache / key[:16]
    if not folder.is_dir():
        partial = cache / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(path, partial, form, rated, cfg)
        os.replace(partial, folder)
    return folder


def _write(path: Path, folder: Path, form: PromptFormat, rated: RatedForm, cfg: RewardModelConfig) -> None:
    with (folder / "tokens").open("wb") as tokens, (folder / DROPPED).open("w") as dropped:
        written = _Written(form, rated, cfg, tokens, dropped)
        rows = read_comparisons(path, cfg.reward_model.loss)
        while batch := list(islice(rows, BATCH)):
            written.add(batch)
    left_out = written.left_out(path)
    np.save(folder / "ends.npy", np.array(written.ends, np.int64))
    np.save(folder / "values.npy", np.array(written.values, np.float32))
    np.save(folder / "domain.npy", np.array(written.domain, np.int16))
    names = ("longest", "longest_at", "largest_token", "largest_token_at")
    about = {name: getattr(written, name) for name in names} | {"left_out": left_out}
    about |= {"domains": list(written.domains), "texts_of_unit": cfg.texts_of_unit}
    (folder / "about.json").write_text(json.dumps(about))


class _Written:
    """What is in memory of a file that is written: a few numbers a row, and what was left out."""

    def __init__(
        self, form: PromptFormat, rated: RatedForm, cfg: RewardModelConfig, tokens: BinaryIO, dropped: TextIO
    ) -> None:
        self._form, self._rated, self._cfg, self._tokens, self._dropped = form, rated, cfg, tokens, dropped
        self.ends, self.values, self.domain = array("q", [0]), array("f"), array("h")
        self.domains: dict[str, int] = {}
        self.longest, self.largest_token, self.longest_at, self.largest_token_at = 0, -1, "", ""
        self.reasons: Counter[str] = Counter()
        self.first: list[str] = []  # of those that were left out

    def add(self, rows: list[Comparison]) -> None:
        """Render and tokenize rows, and write those that can be trained on."""
        kept: list[tuple[Comparison, list[str]]] = []
        for row in rows:
            prompts, seen = [message["content"] for message in row.prompt], [self._seen(text) for text in row.responses]
            if marker := self._form.marker(row.prompt) or forgery(self._rated.template, [*prompts, *seen]):
                self._drop(row, f"hold {marker}, a token of the template or a special one", f"holds {marker}")
            elif not all(text.strip() for text in seen):
                self._drop(row, "have a response without a summary", "has a response without a summary")
            else:
                kept.append((row, seen))
        heads = [head_of(row.prompt, self._form, self._rated, row.place) for row, seen in kept for _ in seen]
        ids = self._rated.tokens(heads, [text for _, seen in kept for text in seen])
        k = self._cfg.texts_of_unit
        for number, (row, _) in enumerate(kept):
            self._take(row, ids[number * k : number * k + k])

    def _seen(self, response: str) -> str:
        return summary(response) if self._cfg.sees == "summary" else response

    def _take(self, row: Comparison, texts: list[list[int]]) -> None:
        longest, limit = max(map(len, texts)), self._cfg.data.max_tokens
        if longest > limit:
            self._drop(row, f"have more than data.max_tokens = {limit:,} tokens", f"has {longest} tokens")
        elif len(texts) == 2 and texts[0] == texts[1]:
            self._drop(row, "have equal tokens", "has equal tokens")
        else:
            for ids in texts:
                self._tokens.write(np.array(ids, np.int32).tobytes())
                self.ends.append(self.ends[-1] + len(ids))
            self.values.append(row.value)
            self.domain.append(self._number(row))
            if longest > self.longest:
                self.longest, self.longest_at = longest, row.place
            if (largest := max(map(max, texts))) > self.largest_token:
                self.largest_token, self.largest_token_at = largest, row.place

    def _number(self, row: Comparison) -> int:
        number = self.domains.setdefault(row.domain, len(self.domains))
        if number >= MOST_DOMAINS:
            raise ValueError(f"{row.place}: domain '{row.domain}' is one more than the {MOST_DOMAINS} of a file")
        return number

    def _drop(self, row: Comparison, reason: str, words: str) -> None:
        self.reasons[reason] += 1
        self._dropped.write(json.dumps({"place": row.place, "reason": words}) + "\n")
        if len(self.first) < LISTED:
            self.first.append(f"{row.place} {words}")

    def left_out(self, path: Path) -> str:
        """How many rows are left out and why, "" for none; ValueError if they are too many."""
        count = sum(self.reasons.values())
        if not count:
            return ""
        total, allowed = count + len(self.values), self._cfg.data.max_dropped
        what = "pairs" if self._cfg.texts_of_unit == 2 else "labels"
        reasons = [f"{n:,} {reason}" for reason, n in self.reasons.most_common()]
        problem = f"{path}: {count:,} of {total:,} {what} ({count / total:.1%}): {'; '.join(reasons)}"
        problem += f" ({'; '.join(self.first)}{' and others' if count > LISTED else ''})"
        if count == total or count > allowed * total:
            raise ValueError(f"{problem}; at most data.max_dropped = {allowed:.1%} may be left out")
        return problem
