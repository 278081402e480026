"""The questions of a file as prompts: read and tokenized once, then mapped from disk by every rank of a node.

A set of millions of rows is neither in the memory of a rank nor tokenized by each. A question that stands in the file
a hundred times is stored once. Imports torch only where a prompt is made (batch.py does).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO, Literal, overload

import numpy as np

from r1engine.data.question import Question
from r1engine.data.questions import AS_IS, question_of, question_rows
from r1engine.data.reading import Reading
from r1engine.data.rows import Row, place

if TYPE_CHECKING:
    from r1engine.batch import Prompt

Overlong = Literal["refuse", "skip"]  # what is done with prompts that are longer than the limit
Encode = Callable[[list[Question]], Sequence[Sequence[int]]]
EncodeAll = Callable[[list[str]], Sequence[Sequence[int]]]  # token ids of each text
Render = Callable[[Question], str]  # a question as the model is shown it

BATCH = 512  # texts tokenized at once
LISTED = 20  # overlong prompts that are named


class PromptTable(Sequence["Prompt"]):
    """The prompts that `write_prompts` wrote, in file order; each is made when it is asked for.

    The files are mapped: their folder may be removed while the table is in use.
    """

    def __init__(self, folder: Path, render: Render) -> None:
        """Opens what `write_prompts` wrote into `folder`, with the same `render`."""
        about = json.loads((folder / "about.json").read_text())
        self.path = Path(about["path"])
        self._files = [Path(file) for file in about["files"]]
        self.rewards = set(about["rewards"])  # that the questions name
        self.notes: list[str] = about["notes"]  # what the user should know of the file
        self._render = render
        # Of each row: its index in all, its number in its file, which of the distinct questions it is, which file.
        self._rows = np.load(folder / "rows.npy", mmap_mode="r")
        # Of each distinct question: where its JSON and its tokens end.
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._json = np.memmap(folder / "questions", np.uint8, "r")
        self._tokens = np.memmap(folder / "tokens", np.int32, "r")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        from r1engine.batch import Prompt

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        question = self.question(index)
        return Prompt(int(self._rows[index, 0]), self.tokens(index), self._render(question), question)

    @property
    def ids(self) -> np.ndarray:
        """[prompts] int64, `Prompt.id` of each; they rise."""
        return self._rows[:, 0]

    def question(self, index: int) -> Question:
        """The question of a prompt, with its place."""
        _, line, which, file = self._rows[index].tolist()
        start, end = self._ends[which : which + 2, 0].tolist()
        *values, columns = json.loads(self._json[start:end].tobytes())
        return replace(Question(*values), place=place(self._files[file], line), columns=columns)

    def tokens(self, index: int) -> list[int]:
        """The token ids of a prompt."""
        which = self._rows[index, 2]
        start, end = self._ends[which : which + 2, 1].tolist()
        return self._tokens[start:end].tolist()

    def lengths(self) -> np.ndarray:
        """[prompts] int64, tokens of each prompt."""
        return np.diff(self._ends[:, 1])[self._rows[:, 2]]

    def beyond(self, vocabulary: int) -> list[int]:
        """The prompts that hold a token id of at least `vocabulary`."""
        at = np.flatnonzero(self._tokens >= vocabulary)
        questions = np.unique(np.searchsorted(self._ends[:, 1], at, side="right") - 1)
        return np.flatnonzero(np.isin(self._rows[:, 2], questions)).tolist()

    def distinct(self, most: int) -> list[Question]:
        """The questions of the first `most` prompts that are not the same as one before."""
        _, first = np.unique(self._rows[:, 2], return_index=True)
        return [self.question(int(index)) for index in np.sort(first)[:most]]


def load_prompts(
    path: Path,
    tokenizer_encode: Callable[[str], list[int]],
    render: Render,
    max_prompt_tokens: int,
    *,
    overlong: Overlong = "refuse",
) -> PromptTable:
    """The questions of a file as prompts, of this process alone. Arguments and errors as of `write_prompts`."""

    def encode_all(texts: list[str]) -> list[list[int]]:
        return [tokenizer_encode(text) for text in texts]

    with TemporaryDirectory(prefix="r1engine-") as folder:
        write_prompts(path, Path(folder), encode_all, render, max_prompt_tokens, overlong=overlong)
        return PromptTable(Path(folder), render)


def write_prompts(
    path: Path,
    folder: Path,
    encode_all: EncodeAll,
    render: Render,
    max_prompt_tokens: int,
    *,
    overlong: Overlong = "refuse",
    reading: Reading = AS_IS,
) -> None:
    """Reads a file of questions once and writes its prompts into `folder`, for `PromptTable`.

    Args:
        path:              data file, folder or pattern, see `read_questions`; `Prompt.id` is the index in it.
        folder:            an empty one.
        encode_all:        texts -> token ids of each, special tokens as the caller wants them.
        render:            a question -> the text that the model is shown.
        max_prompt_tokens: limit of a prompt; none is ever cut.
        overlong:          "refuse" those that are longer, or "skip" them.
        reading:           which column is which.

    Raises:
        ValueError: see `read_questions`; a prompt cannot be tokenized or has no tokens; prompts are longer than the
            limit: their number, the longest and the first of them are named; or all are.
    """
    path, known = Path(path), _Known(reading)
    rows = question_rows(path, reading)
    with (folder / "questions").open("wb") as questions, (folder / "tokens").open("wb") as tokens:
        while batch := list(islice(rows, BATCH)):
            known.add(batch, lambda fresh: _encoded(fresh, encode_all, render), questions, tokens)
    _finish(known, path, folder, max_prompt_tokens, overlong)


def _finish(known: _Known, path: Path, folder: Path, max_prompt_tokens: int, overlong: Overlong) -> None:
    """Leave out or refuse the overlong prompts, and write the index."""
    rows, ends, notes = np.array(known.rows, np.int64).reshape(-1, 4), np.array(known.ends, np.int64).reshape(-1, 2), []
    if len(known.digests) < len(rows):
        notes.append(
            f"{path.name}: {len(rows):,} rows hold {len(known.digests):,} distinct questions; a question is drawn as "
            "often as it stands there"
        )
    lengths, files = np.diff(ends[:, 1])[rows[:, 2]], [*known.files]
    is_long = lengths > max_prompt_tokens
    if is_long.any():
        count, first = int(is_long.sum()), np.flatnonzero(is_long)[:LISTED]
        listed = ", ".join(f"{place(Path(files[rows[i, 3]].name), rows[i, 1])} ({lengths[i]})" for i in first)
        problem = (
            f"{path}: {count:,} of {len(rows):,} prompts have more than max_prompt_tokens = {max_prompt_tokens} "
            f"tokens, the longest {lengths.max()}: {listed}{f' and {count - LISTED:,} more' if count > LISTED else ''}"
        )
        if overlong == "refuse" or is_long.all():
            raise ValueError(f"{problem}; raise data.max_prompt_tokens, or leave them out by data.overlong=skip")
        notes.append(f"left out: {problem}")
    np.save(folder / "rows.npy", rows[~is_long])
    np.save(folder / "ends.npy", ends)
    about = {
        "path": str(path),
        "files": [str(file) for file in files],
        "rewards": sorted(known.rewards),
        "notes": notes,
    }
    (folder / "about.json").write_text(json.dumps(about))


class _Known:
    """What is in memory of a file that is read: four numbers a row, and a digest of each distinct question."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.files: dict[Path, int] = {}  # in their order
        self.digests: dict[bytes, int] = {}  # of a question -> which of the distinct ones it is
        self.rows = array("q")  # of each row: its index, its number in the file, which question it is, which file
        self.ends = array("q", [0, 0])  # before the first, then of each distinct question: ends of its JSON and tokens
        self.rewards: set[str] = set()

    def add(self, rows: list[Row], encode: Encode, questions: BinaryIO, tokens: BinaryIO) -> None:
        """Take rows; the JSON and the tokens of questions that are new are written."""
        fresh, data = [], []
        for row in rows:
            question = question_of(row, self._reading)
            stored = _stored(question)
            digest, number = hashlib.blake2b(stored, digest_size=16).digest(), len(self.digests)
            which = self.digests.setdefault(digest, number)
            self.rows.extend((len(self.rows) // 4, row.number, which, self.files.setdefault(row.path, len(self.files))))
            if which == number:
                fresh.append(question)
                data.append(stored)
        for question, stored, ids in zip(fresh, data, encode(fresh), strict=True):
            questions.write(stored)
            tokens.write(np.array(ids, np.int32).tobytes())
            self.ends.extend((self.ends[-2] + len(stored), self.ends[-1] + len(ids)))
            self.rewards.add(question.reward)


def _stored(question: Question) -> bytes:
    """The fields of a question but its place, as JSON."""
    asked = [question.text, question.answer, question.reward, question.tests, question.language]
    values = [*asked, question.rated_by, question.domain, question.columns]
    try:
        return json.dumps(values).encode()
    except TypeError as error:  # dates and bytes in a column of a .parquet file
        raise ValueError(f"{question.place}: tests are no JSON: {error}") from error


def _encoded(questions: list[Question], encode_all: EncodeAll, render: Render) -> Sequence[Sequence[int]]:
    """Token ids of the prompts of questions."""
    texts = [render(question) for question in questions]
    try:
        encoded = encode_all(texts)
    except Exception:
        for question, text in zip(questions, texts, strict=True):  # which one?
            try:
                encode_all([text])
            except Exception as error:
                raise ValueError(f"{question.place}: cannot be tokenized: {type(error).__name__}: {error}") from error
        raise
    for question, ids in zip(questions, encoded, strict=True):
        if not len(ids):
            raise ValueError(f"{question.place}: the prompt has no tokens, required at least one")
    return encoded
