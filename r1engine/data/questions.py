"""Prompts: questions from JSONL or Parquet, rendered and tokenized, and a resumable stream over them.

Imports torch only when prompts are built (batch.py does), so a data file can be looked at without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1engine.data.question import Question
from r1engine.rewards.code.problems import test_fields
from r1engine.rewards.rules import check_question

if TYPE_CHECKING:
    from r1engine.batch import Prompt

Template = Literal["r1_zero", "none"]

# Table 1 of the paper, word for word; "prompt" is replaced by the question.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)


def render(question: str, template: Template) -> str:
    """The text shown to the model."""
    return R1_ZERO_TEMPLATE.format(question=question) if template == "r1_zero" else question


def read_questions(path: Path) -> list[Question]:
    """All questions of a .jsonl or .parquet file, in file order.

    Fields: `question` (text), `reward` (the rule that grades it, "math" if absent), `answer` (text or number; some
    rewards need none), `tests` (for rewards that run code; a .jsonl line may be a record of LiveCodeBench, HumanEval or
    APPS instead), `language` (of the thoughts, ISO 639-1); others are ignored.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a line is not as above; the line is named.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: found the extension '{path.suffix}', required .jsonl or .parquet")
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, required a data file")
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)
    questions = [_question(row, place) for place, row in rows]
    if not questions:
        raise ValueError(f"{path}: found no questions, required at least one")
    return questions


def read_question(row: dict[str, Any], place: str) -> Question:
    """The question that the fields of a line give, see `read_questions`.

    Args:
        row: holds at least `question`, which may be empty here.
        place: of the line, for messages.

    Raises:
        ValueError: a field is of another type than it should be, or the reward cannot use what is there.
    """
    for name in ("question", "reward", "language"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{place}: {name} is {row[name]!r:.80}, required a text")
    answer, reward = row.get("answer", ""), row.get("reward", "math")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{place}: answer is {answer!r:.80}, required a number or a text")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{place}: answer is {answer}, required a finite number or a text")
    tests = row.get("tests")
    if tests is None and reward == "code":
        tests = test_fields(row)
    question = Question(row["question"], str(answer), reward, tests, row.get("language", ""), place)
    check_question(question)
    return question


def load_prompts(
    path: Path, tokenizer_encode: Callable[[str], list[int]], template: Template, max_prompt_tokens: int
) -> list[Prompt]:
    """The questions of a file as prompts; `Prompt.id` is the index in the file.

    Args:
        path: .jsonl or .parquet file, see `read_questions`.
        tokenizer_encode: text -> token ids, special tokens as the caller wants them.
        template: "r1_zero" (the paper's Table 1) or "none" (the question as it is).
        max_prompt_tokens: limit; a longer prompt is an error, never cut.

    Raises:
        ValueError: see `read_questions`; or a prompt is empty or longer than the limit.
    """
    from r1engine.batch import Prompt

    prompts = []
    for index, question in enumerate(read_questions(path)):
        text = render(question.text, template)
        tokens = list(tokenizer_encode(text))
        if not tokens:
            raise ValueError(f"{question.place}: the prompt (id {index}) has no tokens, required at least one")
        if len(tokens) > max_prompt_tokens:
            raise ValueError(
                f"{question.place}: the prompt (id {index}) has {len(tokens)} tokens, "
                f"required at most max_prompt_tokens = {max_prompt_tokens}"
            )
        prompts.append(Prompt(index, tokens, text, question))
    return prompts


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes (hex)."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PromptStream:
    """Prompts without end, every epoch in another order.

    The order of an epoch is a function of (seed, epoch) alone, so the whole state is two numbers and a run
    resumes exactly where it stopped. It uses no global generator.
    """

    def __init__(self, prompts: list[Prompt], *, seed: int, digest: str) -> None:
        """
        Args:
            prompts: what to draw from.
            seed: of the run.
            digest: SHA-256 of the data file (`file_digest`); resuming on other data is refused.

        Raises:
            ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("PromptStream: found no prompts, required at least one")
        self.prompts, self._seed, self._digest = prompts, seed, digest
        self._epoch, self._position = 0, 0
        self._order = self._shuffled(0)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; runs on into the next epoch."""
        return [self._advance() for _ in range(n)]

    def state(self) -> dict[str, int | str]:
        """What `restore` needs, of plain values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "count": len(self.prompts),
            "sha256": self._digest,
        }

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes to a place given by `state`.

        Raises:
            ValueError: the state is of another data file or seed, or names a place that does not exist.
        """
        here = self.state()
        if set(state) != set(here):
            raise ValueError(f"PromptStream: found a state with keys {sorted(state)}, required {sorted(here)}")
        for key, what in (("count", "number of prompts"), ("sha256", "data file (sha256)"), ("seed", "seed")):
            if state[key] != here[key]:
                raise ValueError(
                    f"PromptStream: the {what} changed since the checkpoint: it has {state[key]}, this run {here[key]}"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self.prompts):
            raise ValueError(
                f"PromptStream: found epoch {epoch}, position {position}, "
                f"required epoch >= 0 and position in 0..{len(self.prompts) - 1}"
            )
        self._epoch, self._position = epoch, position
        self._order = self._shuffled(epoch)

    def _advance(self) -> Prompt:
        prompt = self.prompts[self._order[self._position]]
        self._position += 1
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled(self._epoch)
        return prompt

    def _shuffled(self, epoch: int) -> list[int]:
        """The order of an epoch: indices sorted by a hash of (seed, epoch, index), the same on every platform."""
        return sorted(range(len(self.prompts)), key=lambda index: _hash(self._seed, epoch, index))


def _hash(seed: int, epoch: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: not valid JSON: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    wanted = [name for name in Question("").as_row() if name in file.schema_arrow.names]
    number = 0
    with file:
        for chunk in file.iter_batches(columns=wanted):
            for row in chunk.to_pylist():
                number += 1
                # A column holds null where JSON would leave the field out.
                yield f"{path}: row {number}", {key: value for key, value in row.items() if value is not None}


def _question(row: Any, place: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: found {type(row).__name__}, required an object with `question` and `answer`")
    if "question" not in row:
        raise ValueError(f"{place}: found no field 'question', only {sorted(row)}")
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError(f"{place}: question is {row['question']!r:.80}, required a text that is not empty")
    return read_question(row, place)
