"""Records for the tests of the rewards, in one line."""

from __future__ import annotations

from typing import Any

from r1engine.data.question import Question
from r1engine.rewards import Record


def record(
    reward: str, completion: str, answer: str = "", *, question: str = "", prompt: str = "", **fields: Any
) -> Record:
    """A completion for a question of this reward; `fields` are further ones of the question."""
    return Record(Question(question, answer, reward, **fields), completion, prompt)
