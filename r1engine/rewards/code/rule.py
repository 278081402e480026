"""The row of reward "code" in the table of rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from r1engine.data.question import Question
from r1engine.rewards.code.grade import final_code, grade_code
from r1engine.rewards.code.problems import parse_problem, tests_problem
from r1engine.rewards.record import Record, Verdict
from r1engine.rewards.rule import Rule, Task
from r1engine.rewards.workers.tasks import own_sandbox

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings


def _find_program(record: Record) -> tuple[str | None, str]:
    fields = record.question.tests if isinstance(record.question.tests, dict) else {}
    return final_code(
        record.completion,
        "cpp" if fields.get("language") == "cpp" else "python",
        think_prefilled=record.think_prefilled,
        bare_allowed="entry_point" in fields,
    )


def _grade(program: str, record: Record, settings: ScorerSettings) -> Task:
    return Task(compute, (program, record.question.tests, settings.unsafe))


def compute(program: str, tests: dict[str, Any] | list[Any], unsafe: bool) -> tuple[Verdict, str]:
    """(verdict, reason) of a program; `tests` as `problems.parse_problem` takes them."""
    try:
        problem = parse_problem(tests)
    except ValueError as error:
        return "undecided", str(error)
    return grade_code(program, problem, own_sandbox((), unsafe))


def _reference_problem(question: Question) -> str:
    return tests_problem(question.tests)


CODE = Rule("code", _grade, find=_find_program, needs="tests", runs_code=True, reference_problem=_reference_problem)
