"""What a rule of the rewards is: a row of the table in rules.py, and what it says of one completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from r1engine.data.question import Question
from r1engine.rewards.extract import final_answer
from r1engine.rewards.record import Record, Verdict

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings


class Grade(NamedTuple):
    """What a rule says of a completion."""

    verdict: Verdict
    reason: str  # one line
    # None: the rule's own component, 1 if right and 0 if wrong; none if undecided, which is no reward of 0
    components: dict[str, float] | None = None


@dataclass(frozen=True)
class Task:
    """A grade that takes any time or memory to compute: a killable worker calls the function."""

    function: Callable[..., Any]  # of a module, where the worker finds it by its name; takes and returns JSON values
    arguments: tuple[Any, ...]

    def __post_init__(self) -> None:
        if "." in self.function.__qualname__:  # a worker could not find it, and everything would be undecided
            raise ValueError(f"Task: found {self.function.__qualname__}, required a function at the top of a module")


@dataclass(frozen=True)
class Inquiry:
    """A grade that needs the opinion of language models: their servers are asked."""

    items: dict[str, Any]  # server -> what it is asked
    conclude: Callable[[dict[str, Any]], Grade]  # of the replies, by server


def find_answer(record: Record) -> tuple[str | None, str]:
    """The final answer of a completion, or None and why there is none."""
    return final_answer(record.completion, think_prefilled=record.think_prefilled)


def find_all(record: Record) -> tuple[str | None, str]:
    """The whole completion."""
    return record.completion, ""


@dataclass(frozen=True)
class Rule:
    """One reward. Its functions take microseconds: what may take longer is in the `Task` that they return."""

    name: str  # as a question's `reward` gives it
    # Of what `find` found, its record and the scorer's settings. A `Task` of it returns the fields of a `Grade`.
    grade: Callable[[str, Record, ScorerSettings], Grade | Task | Inquiry]
    find: Callable[[Record], tuple[str | None, str]] = (
        find_answer  # what is graded; None is wrong, for the reason given
    )
    component: str = "accuracy"  # that its verdict gives a value
    needs: Literal["answer", "tests"] | None = None  # field of the question, without which nothing can be graded
    server: Literal["judge", "reward_models"] | None = None  # of the settings, which must be there
    runs_code: bool = False  # its tasks run programs of the model, in a sandbox and with another deadline
    warm_up: Callable[[], None] | None = None  # loads what its tasks need, before workers are forked
    # Why no answer can be graded by the question's reference or tests, or ""; a `Task` of it returns the same.
    reference_problem: Callable[[Question], str | Task] = lambda _: ""

    def begin(self, record: Record, settings: ScorerSettings) -> Grade | Task | Inquiry:
        """The grade of a record, or what it takes to find it."""
        found, why_none = self.find(record)
        return Grade("wrong", why_none) if found is None else self.grade(found, record, settings)

    def components(self, grade: Grade) -> dict[str, float]:
        """The components that a grade adds to the score."""
        if grade.components is not None:
            return grade.components
        return {} if grade.verdict == "undecided" else {self.component: float(grade.verdict == "right")}
