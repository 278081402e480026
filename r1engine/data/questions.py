"""Questions from JSONL or Parquet. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1engine.config.rewards import RATED_REWARDS
from r1engine.data.question import Question
from r1engine.data.reading import AS_IS, Reading, reference_in
from r1engine.data.rows import Row, missing, read_rows
from r1engine.rewards.code.problems import test_fields
from r1engine.rewards.rules import check_question

FIELDS = ("question", "answer", "reward", "tests", "language", "rated_by", "domain")  # of a row; others are ignored


def read_questions(path: Path, reading: Reading = AS_IS) -> list[Question]:
    """All questions of a data file (or of all files of a folder or pattern), in file order.

    Fields: `question` (text), `reward` (the rule that grades it, "math" if absent), `answer` (text or number; some
    rewards need none), `tests` (for rewards that run code; a .jsonl line may be a record of LiveCodeBench, HumanEval or
    APPS instead), `language` (of the thoughts, ISO 639-1), `domain` (what is counted together); others are ignored.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a row is not as above; the row is named.
    """
    return [question_of(row, reading) for row in question_rows(path, reading)]


def question_rows(path: Path, reading: Reading = AS_IS) -> Iterator[Row]:
    """The rows of a data file, for `question_of`."""
    one_of = ("question",) if "question" not in reading.columns else ()  # else `Reading.row` says what is missing
    return read_rows(path, reading.names(FIELDS), one_of=one_of, every_column=reading.keeps_columns)


def read_question(row: dict[str, Any], place: str) -> Question:
    """The question that the fields of a line give, see `read_questions`.

    Args:
        row: holds at least `question`, which may be empty here.
        place: of the line, for messages.

    Raises:
        ValueError: a field is of another type than it should be, or the reward cannot use what is there.
    """
    for name in ("question", "reward", "language", "rated_by", "domain"):
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
    rated_by = row.get("rated_by", "")
    if rated_by not in ("", *RATED_REWARDS) or (rated_by and reward != "preference"):
        raise ValueError(
            f"{place}: rated_by is {rated_by!r:.40}, required {' or '.join(RATED_REWARDS)} with reward preference"
        )
    language, domain = row.get("language", ""), row.get("domain", "")
    question = Question(row["question"], str(answer), reward, tests, language, rated_by, domain, place)
    check_question(question)
    return question


def question_of(row: Row, reading: Reading = AS_IS) -> Question:
    """The question of a row of a data file; ValueError if it is none, with its place."""
    row = reading.row(row)
    fields, place = row.fields, row.place
    if "question" not in fields:
        raise ValueError(f"{place}: {missing('question', row.columns)}")
    if not isinstance(fields["question"], str) or not fields["question"].strip():
        raise ValueError(f"{place}: question is {fields['question']!r:.80}, required a text that is not empty")
    if isinstance(fields.get("answer"), str) and fields.get("reward", "math") == "math":
        try:
            fields = fields | {"answer": reference_in(fields["answer"], reading.answer_form)}
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    try:
        question = read_question(fields, place)
    except ValueError as error:
        if "answer" in fields:
            raise
        there = "answer is null" if "answer" in row.columns else f"the fields there are {row.columns}"
        raise ValueError(f"{error}; {there}") from error
    for name, text in (("question", question.text), ("answer", question.answer)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {name} is {text!r:.80}, required a text that is Unicode: {error}") from error
    if reading.keeps_columns:
        others = {name: value for name, value in fields.items() if name not in FIELDS}
        return replace(question, columns=json.loads(json.dumps(others, default=str)))  # dates and the like as text
    return question
