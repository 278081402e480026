"""Pairs and labels as tokens: rendered and tokenized once, then mapped from disk by every rank."""

from __future__ import annotations

import hashlib
import json
from array import array
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from r1engine.config.reward_model import RewardModelConfig
from r1engine.data.chat import PromptFormat
from r1engine.data.comparisons import Comparison, read_comparisons
from r1engine.data.rated import RatedForm, head_of
from r1engine.data.reading import Reading
from r1engine.data.stream import file_digest
from r1engine.data.token_files import DROPPED, TokenFiles, TokenWriter, cached, of_length, of_marker
from r1engine.rewards.rated import forgery
from r1engine.rewards.servers.preference import summary

FORMAT = 1  # of the files, and of how texts become tokens
BATCH = 128  # rows tokenized at once


class Rated(NamedTuple):
    """One pair or label."""

    texts: list[list[int]]  # token ids of two texts, the better one first, or of one
    value: float  # delta, or 1 (safe) and 0


class RatedTable(TokenFiles):
    """The pairs or labels that `cached_ratings` wrote."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of `folder`."""
        super().__init__(folder)
        self.values = np.load(folder / "values.npy", mmap_mode="r")  # [N] float32
        self._texts_of_unit = (len(self._ends) - 1) // len(self.values)

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
    parts += sorted(cfg.data.columns.items())
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
    return cached(cache, key, lambda folder: _write(path, folder, form, rated, cfg))


def _write(path: Path, folder: Path, form: PromptFormat, rated: RatedForm, cfg: RewardModelConfig) -> None:
    with (folder / "tokens").open("wb") as tokens, (folder / DROPPED).open("w") as dropped:
        written = _Written(form, rated, cfg, tokens, dropped)
        rows = read_comparisons(path, cfg.reward_model.loss, Reading(cfg.data.columns))
        while batch := list(islice(rows, BATCH)):
            written.add(batch)
    what = "pairs" if cfg.texts_of_unit == 2 else "labels"
    written.save(folder, written.left_out(path, what, cfg.data.max_dropped))
    np.save(folder / "values.npy", np.array(written.values, np.float32))


class _Written(TokenWriter):
    """Pairs or labels of a file, tokenized as they come."""

    def __init__(
        self, form: PromptFormat, rated: RatedForm, cfg: RewardModelConfig, tokens: BinaryIO, dropped: TextIO
    ) -> None:
        super().__init__(tokens, dropped)
        self._form, self._rated, self._cfg, self.values = form, rated, cfg, array("f")

    def add(self, rows: list[Comparison]) -> None:
        """Render and tokenize rows, and write those that can be trained on."""
        kept: list[tuple[Comparison, list[str]]] = []
        for row in rows:
            prompts, seen = [message["content"] for message in row.prompt], [self._seen(text) for text in row.responses]
            if marker := self._form.marker(row.prompt) or forgery(self._rated.template, [*prompts, *seen]):
                self.drop(row.place, *of_marker(marker))
            elif not all(text.strip() for text in seen):
                self.drop(row.place, "have a response without a summary", "has a response without a summary")
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
            self.drop(row.place, *of_length(longest, limit))
        elif len(texts) == 2 and texts[0] == texts[1]:
            self.drop(row.place, "have equal tokens", "has equal tokens")
        else:
            self.take(texts, row.domain, row.place)
            self.values.append(row.value)
