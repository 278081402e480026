"""What is scored and what a score is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    num_tokens: int | None = None  # of the completion; None: nobody has counted
    truncated: bool = False  # the completion was stopped by the token limit

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
        return {"id": self.id, **self.question.as_row(), "prompt": self.prompt, "completion": self.completion} | (
            {} if self.num_tokens is None else {"num_tokens": self.num_tokens, "truncated": self.truncated}
        )


@dataclass(frozen=True)
class Score:
    """What the rules say of one completion."""

    verdict: Verdict  # "undecided": a rule could not be computed, which is no reward of 0
    components: dict[str, float]  # each rule's value, unweighted; a rule that could not be computed is not in it
    reason: str  # one line
    seconds: float = 0.0  # spent on it, with waiting for the servers that were asked
    unknown: dict[str, str] = field(default_factory=dict)  # function of the user that gave no value -> why
    # (tokens of the completion up to its end, score in [0, 1]) of each step, where a process reward model scores them
    steps: tuple[tuple[int, float], ...] = ()

    def is_undecided(self, weights: Mapping[str, float]) -> bool:
        """Whether the total reward is unknown: the verdict is, or a function whose value has a weight gave none."""
        return self.verdict == "undecided" or any(weights.get(name, 0) for name in self.unknown)
