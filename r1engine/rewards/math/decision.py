"""What the comparisons of the accuracy rule share: a decision, the policy, and the judge that asks them in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1engine.rewards.record import Verdict

if TYPE_CHECKING:
    from r1engine.rewards.math.normalize import Answer

MAX_DEPTH = 20
Decision = tuple[Verdict, str]  # verdict and reason in one line
Compute = Callable[[str, str], Decision]  # of two plain expressions: answer, reference
Comparison = Callable[
    ["Comparer", "Answer", "Answer"], "Decision | None"
]  # answer, reference; None: not mine to decide


@dataclass(frozen=True)
class MathPolicy:
    """What the question, which no rule sees, would have to settle. The defaults leave it undecided."""

    percent_may_be_missing: bool = False  # 10% and 10 are the same
    interval_may_be_inequality: bool = False  # (3, \\infty) and x > 3 are the same


STRICT = MathPolicy()


@dataclass(frozen=True)
class Comparer:
    """Asks the comparisons in their order; what none decides is computed."""

    policy: MathPolicy
    compute: Compute
    comparisons: tuple[Comparison, ...]
    depth: int = 0  # of comparisons in comparisons, as of lists in lists

    def compare(self, answer: Answer, reference: Answer) -> Decision:
        """(verdict, reason) of two normalized answers."""
        if self.depth > MAX_DEPTH:
            return "undecided", f"more than {MAX_DEPTH} parts inside each other"
        inner = Comparer(self.policy, self.compute, self.comparisons, self.depth + 1)
        for comparison in self.comparisons:
            if (decided := comparison(inner, answer, reference)) is not None:
                return decided
        return self.compute(answer.text, reference.text)


def all_of(decisions: list[Decision]) -> Decision:
    """Wrong if any item is, else undecided if any is, else right."""
    for verdict in ("wrong", "undecided"):
        for decision in decisions:
            if decision[0] == verdict:
                return decision
    return "right", "same items"


def yes_no(is_same: bool, how: str) -> Decision:
    """Right with "same ...", or wrong with "another ..."."""
    return ("right", f"same {how}") if is_same else ("wrong", f"another {how}")
