"""Questions from JSONL or Parquet, rendered and tokenized.

Imports torch only when prompts are built (batch.py does), so a data file can be looked at without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1engine.data.question import Question
from r1engine.data.rows import read_rows
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
    fields = ("question", "answer", "reward", "tests", "language")
    return [_question(row, place) for place, row in read_rows(path, fields)]


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


def _question(row: Any, place: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: found {type(row).__name__}, required an object with `question` and `answer`")
    if "question" not in row:
        raise ValueError(f"{place}: found no field 'question', only {sorted(row)}")
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError(f"{place}: question is {row['question']!r:.80}, required a text that is not empty")
    return read_question(row, place)
