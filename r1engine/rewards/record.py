"""What is scored and what a score is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from r1engine.data.question import Question

Verdict = Literal["right", "wrong", "undecided"]


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
