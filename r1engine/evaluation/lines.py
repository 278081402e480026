"""The lines of an evaluation's files: a reply is named by (benchmark, question, sample) in all of them. No torch.

samples/<benchmark>.<rank>.jsonl   SampleLine, appended as replies end
grades/<benchmark>.jsonl           GradeLine, written anew whenever the replies are graded
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from r1engine.rewards.record import Verdict

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class SampleLine:
    """A reply."""

    q: str  # Item.id
    s: int  # sample, 0 to k - 1
    text: str  # decoded; thoughts that the prompt opened are opened in it
    tokens: int | None  # None: the server does not say
    finish: Finish  # of "error" only the error is of use: the reply is drawn again
    prompt_tokens: int | None
    seed: int
    seconds: float  # from its request on; from the beginning of the drawing where one process draws many at once
    error: str = ""

    @property
    def is_done(self) -> bool:
        """Whether this is a reply; else it is drawn again."""
        return self.finish != "error"


@dataclass(frozen=True)
class GradeLine:
    """What a reply is worth; the fields of `benchmark.Marked`, and who says so."""

    q: str
    s: int
    verdict: Verdict
    score: float | None
    answer: str | None
    reason: str
    grader: str  # Benchmark.grader
    parts: dict[str, float] = field(default_factory=dict)
