"""Two rules without arithmetic: the letters of a multiple choice, and exact text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from r1engine.data.question import Question
from r1engine.rewards.math.normalize import unwrap
from r1engine.rewards.record import Record, Verdict
from r1engine.rewards.rule import Grade, Rule

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings

_CHOICE = re.compile(r"(?:(?:option|choice|answer)s?\s*:?\s*)?[\[(]?([A-Za-z])[\])]?(?:[.:)](?:\s.*)?)?", re.I | re.S)
_SEPARATOR = re.compile(r"\s*(?:,|;|/|&|\band\b|\\&)\s*")


def judge_choice(answer: str, reference: str) -> tuple[Verdict, str]:
    """(verdict, reason) of the letters chosen: `B`, `(b)`, `B. because`, `Option B`; `A, C` and `A and C` for several.

    Letters are compared without case, several in any order. A reference that names no letter is undecided.
    """
    required = choices(reference)
    if not required:
        return "undecided", "the reference is no choice letter"
    found = choices(answer)
    if not found:
        return "wrong", "the answer is no choice letter"
    if found == required:
        return "right", "same choice"
    return "wrong", f"found {', '.join(sorted(found))}, required {', '.join(sorted(required))}"


def choices(text: str) -> frozenset[str]:
    """The letters that `text` chooses, in capitals; none if it is anything but a choice."""
    text = unwrap(text.strip())
    if whole := _CHOICE.fullmatch(text):
        return frozenset(whole[1].upper())
    parts = [_CHOICE.fullmatch(part) for part in _SEPARATOR.split(text)]
    return frozenset(part[1].upper() for part in parts if part) if all(parts) else frozenset()


def judge_exact(answer: str, reference: str) -> tuple[Verdict, str]:
    """(verdict, reason) of a text that must be the reference; only white space and math delimiters may differ."""
    same = " ".join(unwrap(answer.strip()).split()) == " ".join(unwrap(reference.strip()).split())
    return ("right", "same text") if same else ("wrong", "another text")


def _grade_choice(answer: str, record: Record, _: ScorerSettings) -> Grade:
    return Grade(*judge_choice(answer, record.question.answer))


def _choice_problem(question: Question) -> str:
    return "" if choices(question.answer) else "is no choice letter"


def _grade_exact(answer: str, record: Record, _: ScorerSettings) -> Grade:
    return Grade(*judge_exact(answer, record.question.answer))


CHOICE = Rule("choice", _grade_choice, needs="answer", reference_problem=_choice_problem)
EXACT = Rule("exact", _grade_exact, needs="answer")
