"""Decontamination (v2 of the paper, D.1): no training text shares an n-gram with an evaluation question or solution.

Units are words, or single characters of scripts that are written without spaces: divided at spaces alone, a verbatim
copy in Chinese has no n-gram at all. Case, punctuation, white space and Unicode's compatibility forms do not matter.
Paraphrases are not found.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from r1engine.data.rows import missing, read_rows
from r1engine.rewards.language import PER_CHARACTER_CLASS

NGRAM = 10  # units. v2 D.1: "10-gram"
FIELDS = ("question", "answer", "solution")  # of an evaluation set; others are ignored
_UNIT = re.compile(f"[{PER_CHARACTER_CLASS}]|[^\\W_{PER_CHARACTER_CLASS}]+")
_ASCII = {code: " " for code in range(128) if not chr(code).isalnum()}
_FACTOR = 0x9E3779B97F4A7C15  # odd: of the polynomial that the hash of an n-gram is, modulo 2**64
_SPREAD = 16  # entries of the first table for one n-gram; most n-grams of other texts end there


@dataclass(frozen=True)
class EvaluationText:
    """A question of an evaluation set, or the reference solution of one."""

    text: str
    place: str  # "aime.jsonl:7"
    is_question: bool = True  # a short one counts only where a question is equal to it


@dataclass(frozen=True)
class Overlap:
    """What a text shares with an evaluation set."""

    place: str  # of the evaluation set's row
    shared: str  # units of the n-gram, or of the whole short question, with spaces between them

    def __str__(self) -> str:
        return f"{self.place}: {self.shared!r}"


def units(text: str) -> list[str]:
    """Words and single characters of a text, as they are compared."""
    if text.isascii():  # the same, three times as fast
        return text.lower().translate(_ASCII).split()
    return _UNIT.findall(unicodedata.normalize("NFKC", text).lower())


def read_evaluation_texts(path: Path) -> Iterator[EvaluationText]:
    """The questions, answers and solutions of a .jsonl or .parquet file; `question` is required.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a question is no text; the row is named.
    """
    for row in read_rows(path, FIELDS):
        if not isinstance(row.fields.get(FIELDS[0]), str):
            found = row.fields.get(FIELDS[0])
            words = missing(FIELDS[0], row.columns) if found is None else f"question is {found!r:.80}, required a text"
            raise ValueError(f"{row.place}: {words}")
        for field in FIELDS:
            if isinstance(text := row.fields.get(field), str) and text.strip():
                yield EvaluationText(text, row.place, is_question=field == FIELDS[0])


class EvaluationIndex:
    """The n-grams of evaluation sets: 12 bytes a unit, and 16 more for the table that is looked at first."""

    def __init__(self, texts: Iterable[EvaluationText], *, size: int = NGRAM) -> None:
        """
        Args:
            texts: that no training text may share anything with.
            size:  units of an n-gram. A question with fewer is looked for whole, as the whole of a question; an answer
                with fewer says nothing.
        """
        self.size = size
        self._numbers: dict[str, int] = {}  # of each unit, from 1; 0 stands for every other one
        self._short: dict[tuple[str, ...], str] = {}  # units of a whole question -> its place
        self._places: list[str] = []
        all_units, starts, ends = array("i"), array("q"), array("q")
        for entry in texts:
            found = units(entry.text)
            if len(found) < size:
                if entry.is_question and found:
                    self._short.setdefault(tuple(found), entry.place)
                continue
            starts.append(len(all_units))
            all_units.extend(self._numbers.setdefault(unit, len(self._numbers) + 1) for unit in found)
            ends.append(len(all_units))
            self._places.append(entry.place)
        self._units = np.array(all_units, np.int32)
        self._starts = np.array(starts, np.int64)
        self._powers = np.array([pow(_FACTOR, k, 2**64) for k in range(size)], np.uint64)
        self._fill(np.array(ends, np.int64))

    def _fill(self, ends: np.ndarray) -> None:
        """Sort the n-grams by their hash; none reaches from one text into the next."""
        begins = [np.arange(start, end - self.size + 1) for start, end in zip(self._starts, ends, strict=True)]
        positions = np.concatenate(begins) if begins else np.zeros(0, np.int64)
        hashes = self._hashes(self._units)[positions]
        order = np.argsort(hashes, kind="stable")  # of equal ones the first of the file stays the first
        self._hashes_sorted, self._positions = hashes[order], positions[order].astype(np.uint32)
        bits = max(10, (_SPREAD * len(positions)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)
        self._table[hashes >> self._shift] = True

    def __len__(self) -> int:
        """N-grams and short questions."""
        return len(self._positions) + len(self._short)

    def find(self, questions: Iterable[str], others: Iterable[str] = ()) -> Overlap | None:
        """The first thing that the texts of one row share with the evaluation sets; None if there is nothing.

        Args:
            questions: what is asked; also held whole against the short questions.
            others:    the other texts of the row, such as answers.
        """
        for text in questions:
            found = units(text)
            if (place := self._short.get(tuple(found))) is not None:
                return Overlap(place, " ".join(found))
            if (overlap := self._shared(found)) is not None:
                return overlap
        return next((overlap for text in others if (overlap := self._shared(units(text))) is not None), None)

    def _shared(self, found: list[str]) -> Overlap | None:
        """The first n-gram that is in the index."""
        if len(found) < self.size or not len(self._positions):
            return None
        numbers = np.fromiter(map(self._numbers.get, found, repeat(0)), np.int32, len(found))
        hashes = self._hashes(numbers)
        places = np.flatnonzero(self._table[hashes >> self._shift])
        entries = np.searchsorted(self._hashes_sorted[:-1], hashes[places])  # never behind the last one
        is_there = self._hashes_sorted[entries] == hashes[places]
        for at, entry in zip(places[is_there].tolist(), entries[is_there].tolist(), strict=True):
            if (place := self._place(numbers[at : at + self.size], hashes[at], entry)) is not None:
                return Overlap(place, " ".join(found[at : at + self.size]))
        return None

    def _place(self, gram: np.ndarray, of_gram: np.uint64, entry: int) -> str | None:
        """Where an n-gram stands that has the hash of entry `entry`; None: another one has that hash."""
        while entry < len(self._positions) and self._hashes_sorted[entry] == of_gram:
            position = int(self._positions[entry])
            if np.array_equal(self._units[position : position + self.size], gram):
                return self._places[int(np.searchsorted(self._starts, position, side="right")) - 1]
            entry += 1
        return None

    def _hashes(self, numbers: np.ndarray) -> np.ndarray:
        """[len - size + 1] uint64, of the n-gram that begins at each unit."""
        count, wide = max(0, len(numbers) - self.size + 1), numbers.astype(np.uint64)
        hashes = np.zeros(count, np.uint64)
        for k, power in enumerate(self._powers):
            hashes += wide[k : k + count] * power
        return hashes
