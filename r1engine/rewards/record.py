"""What is scored and what a score is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1engine.rewards.code.problems import test_fields
from r1engine.rewards.language import check_language

Verdict = Literal["right", "wrong", "undecided"]

# What a record may name.
REWARDS = ("math", "choice", "exact", "format", "language", "code", "gym", "judge", "preference")
NEED_ANSWER = ("math", "choice", "exact", "judge")
NEED_TESTS = ("code", "gym")


@dataclass(frozen=True)
class Record:
    """One completion, with what its reward needs to know."""

    reward: str  # one of REWARDS
    completion: str  # what the model wrote after the prompt
    answer: str = ""  # the reference
    prompt: str = ""
    tests: Any = None  # JSON value: of "code" see `code_problems.parse_problem`, of "gym" `gym.gym_records`
    language: str = ""  # that the thoughts are to be in (ISO 639-1); "": that of the question
    question: str = ""  # what is asked, without a template; "": the prompt
    id: str = ""

    @property
    def think_prefilled(self) -> bool:
        """Whether the prompt itself ends with `<think>`, so that the completion starts inside the block."""
        return self.prompt.rstrip().endswith("<think>")


@dataclass(frozen=True)
class Score:
    """What the rules say of one completion."""

    verdict: Verdict  # "undecided": a rule could not be computed, which is no reward of 0
    components: dict[str, float]  # each rule's value, unweighted; a rule that could not be computed is not in it
    reason: str  # one line
    seconds: float = 0.0  # spent on it, with waiting for the servers that were asked


def check_reward(reward: str, answer: str, where: str, tests: Any = None) -> None:
    """Refuses a record that cannot be scored.

    Args:
        reward: its name in the record.
        answer: the reference; "" if there is none.
        where: the record's place, for the message.
        tests: what the record holds for the rewards that run code; None if nothing.

    Raises:
        ValueError: there is no such reward, or it needs a reference and there is none.
    """
    if reward not in REWARDS:
        raise ValueError(f"{where}: found reward '{reward}', required one of {', '.join(REWARDS)}")
    if reward in NEED_ANSWER and not answer.strip():
        raise ValueError(f"{where}: found no `answer`, required by reward '{reward}'")
    if reward in NEED_TESTS and not isinstance(tests, (dict, list)):
        raise ValueError(f"{where}: found tests {tests!r:.40}, required by reward '{reward}' an object or a list")


def read_records(path: Path) -> list[Record]:
    """The records of a JSONL file: reward, completion, and what the reward needs; id is the line if not given.

    Bytes that are no UTF-8 are kept as lone surrogates, as they can only come from a completion.

    Raises:
        ValueError: no such file, no records, or a line that is no record; the line is named.
    """
    if not path.is_file():
        raise ValueError(f"{path}: found no such file, required a .jsonl file of completions")
    records = []
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_record(line, f"{path}:{number}", number))
    if not records:
        raise ValueError(f"{path}: found no records, required at least one")
    return records


def _record(line: str, where: str, number: int) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {type(row).__name__}, required an object with `reward` and `completion`")
    for name in ("reward", "completion"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} is {row.get(name)!r:.80}, required a text")
    for name in ("prompt", "language", "question"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{where}: {name} is {row[name]!r:.80}, required a text")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise ValueError(f"{where}: answer is {answer!r:.80}, required a text or a number")
    answer = "" if answer is None else str(answer)
    tests = row.get("tests")
    if tests is None and row["reward"] == "code":
        tests = test_fields(row)
    check_reward(row["reward"], answer, where, tests)
    if row.get("language"):
        check_language(row["language"], where)
    return Record(
        reward=row["reward"],
        completion=row["completion"],
        answer=answer,
        prompt=row.get("prompt", ""),
        tests=tests,
        language=row.get("language", ""),
        question=row.get("question", ""),
        id=str(row.get("id", number)),
    )
