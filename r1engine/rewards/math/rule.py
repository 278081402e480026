"""The row of reward "math" in the table of rules."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from r1engine.data.question import Question
from r1engine.rewards.math.accuracy import judge, judge_at_once, reference_problem, reference_problem_at_once
from r1engine.rewards.math.decision import MathPolicy
from r1engine.rewards.record import Record
from r1engine.rewards.rule import Grade, Rule, Task

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings


def _grade(answer: str, record: Record, settings: ScorerSettings) -> Grade | Task:
    reference = record.question.answer
    if (decided := judge_at_once(answer, reference, settings.policy)) is not None:
        return Grade(*decided)
    return Task(compute, (answer, reference, asdict(settings.policy)))


def compute(answer: str, reference: str, policy: dict[str, Any]) -> tuple[str, str]:
    """(verdict, reason) by algebra, where text and exact numbers do not settle it."""
    return judge(answer, reference, MathPolicy(**policy))


def _reference_problem(question: Question) -> str | Task:
    problem = reference_problem_at_once(question.answer)
    return Task(reference_problem, (question.answer,)) if problem is None else problem


def warm_up() -> None:
    """Loads SymPy and lets ANTLR build its tables."""
    for answer, reference in (  # by values, by numbers, by simplifying, as equations and as inequalities
        ("\\frac{x+1}{2}", "\\frac{1+x}{2}"),
        ("\\sqrt{2}+\\pi", "e^{2}"),
        ("\\sin^2(x)+\\cos^2(x)", "1"),
        ("y=2x+1", "2x-y+1=0"),
        ("x+y<3", "3>y+x"),
    ):
        judge(answer, reference)


MATH = Rule("math", _grade, needs="answer", warm_up=warm_up, reference_problem=_reference_problem)
