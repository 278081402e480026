"""What is scored and what a score is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from r1engine.data.question import Question
from r1engine.rewards.language import check_language

Verdict = Literal["right", "wrong", "undecided"]

# What a record may name.
REWARDS = ("math", "choice", "exact", "format", "language", "code", "gym", "judge", "preference")
NEED_ANSWER = ("math", "choice", "exact", "judge")
NEED_TESTS = ("code", "gym")


@dataclass(frozen=True)
class Record:
    """One completion, with what its reward needs to know."""

    question: Question
    completion: str  # what the model wrote after the prompt
    prompt: str = ""  # as the model saw it
    id: str = ""

    @property
    def think_prefilled(self) -> bool:
        """Whether the prompt itself ends with `<think>`, so that the completion starts inside the block."""
        return self.prompt.rstrip().endswith("<think>")

    @property
    def asked(self) -> str:
        """What is asked: the question, or the prompt where the record holds no question of its own."""
        return self.question.text or self.prompt

    def as_row(self) -> dict[str, Any]:
        """The record as a line of a file; `offline.read_records` reads it."""
        return {"id": self.id, **self.question.as_row(), "prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Score:
    """What the rules say of one completion."""

    verdict: Verdict  # "undecided": a rule could not be computed, which is no reward of 0
    components: dict[str, float]  # each rule's value, unweighted; a rule that could not be computed is not in it
    reason: str  # one line
    seconds: float = 0.0  # spent on it, with waiting for the servers that were asked


def check_question(question: Question) -> None:
    """Refuses a question whose answers cannot be scored.

    Raises:
        ValueError: there is no such reward, it needs a reference or tests and there are none, or the language is
            unknown; the question's place is named.
    """
    where, reward = question.place, question.reward
    if reward not in REWARDS:
        raise ValueError(f"{where}: found reward '{reward}', required one of {', '.join(REWARDS)}")
    if reward in NEED_ANSWER and not question.answer.strip():
        raise ValueError(f"{where}: found no `answer`, required by reward '{reward}'")
    if reward in NEED_TESTS and not isinstance(question.tests, (dict, list)):
        raise ValueError(
            f"{where}: found tests {question.tests!r:.40}, required by reward '{reward}' an object or a list"
        )
    if question.language:
        check_language(question.language, where)
