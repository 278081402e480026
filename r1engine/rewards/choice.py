"""Two rules without arithmetic: the letters of a multiple choice, and exact text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from r1engine.data.question import Question
from r1engine.rewards.math import chinese
from r1engine.rewards.math.characters import to_latex
from r1engine.rewards.math.markdown import without_markdown
from r1engine.rewards.math.normalize import unwrap
from r1engine.rewards.math.tex import tidy
from r1engine.rewards.math.words import CJK, any_of
from r1engine.rewards.record import Record, Verdict
from r1engine.rewards.rule import Grade, Rule

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings

# What may stand before the letters and says nothing else.
_CHINESE = (*chinese.CONCLUSIONS, *chinese.ADJECTIVES, *chinese.NOUNS, *chinese.COPULAS, *chinese.OPTIONS)
_BEFORE = re.compile(
    r"(?:(?:so|thus|hence|therefore|both|only|just|i|we|it|it's|this|the|my|our|would|will|must|should|be|is|are|was"
    r"|correct|right|best|final|true|following|statements?|options?|choices?|letters?|answers?|choose|chose"
    r"|pick|picked|select|selected|go with|say|think)\b\s*[:,=]?\s*"
    rf"|{any_of(_CHINESE)}[:,\s]*"
    r"|[:]\s*)+",
    re.IGNORECASE,
)
_AFTER = (
    rf"(?:\s*(?:{any_of(chinese.OPTIONS)}|only|is (?:the )?(?:correct|right|best|true)(?: \w+)?"
    r"|are (?:correct|right|true)|are (?:the )?(?:correct|right) \w+)\.?)"
)
_LETTER = r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\)?)"
# A reason or the text of the choice: behind a stop or bracket, a spaced dash, a new line, "because".
_REASON = (
    r"(?!\s*is (?:not|wrong|incorrect))"
    r"(?:[.:)](?:\s.*)?|(?<=[)\]])\s*(?!\(|(?:and|or)\b|[,;/&+])\S.*|\s+-+\s.*|\s*\n.*"
    r"|\s*,?\s+(?:because|since|as|for)\b.*|\s+\(.*\)\.?"
    rf"|\s*,\s*[{CJK}].*)"
)
_ONE = re.compile(rf"{_LETTER}{_AFTER}?{_REASON}?", re.DOTALL)
_AND = any_of(("\\band\\b", *(word for word in chinese.JOINED if word not in chinese.OR)))
_SEPARATOR = re.compile(rf"\s*(?:,|;|/|&|\+|\\&|{_AND})\s*(?:{_AND}\s*)?|(?<=\))\s*(?=\()|\s+(?=\(?[A-Z]\b)")
_RUN = re.compile(r"[A-J]{2,10}")  # ABD: capitals only, as bad is a word


def judge_choice(answer: str, reference: str) -> tuple[Verdict, str]:
    """(verdict, reason) of the letters chosen: `B`, `(b)`, `B. because`, `Option B`; `A, C`, `A and C`, `AC` for more.

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
    text = _plain(text)
    before = _BEFORE.match(text)
    for candidate in (text, text[before.end() :].strip() if before else ""):
        if found := _letters(candidate):
            return found
    return frozenset()


def _plain(text: str) -> str:
    text = unwrap(to_latex(without_markdown(text.strip())).strip())
    if "\\" in text:
        text = re.sub(r"\\text\{([^{}]*)\}", r"\1", tidy(text))
    text = re.sub(r"[ \t]+", " ", text.replace("$", ""))
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _letters(text: str) -> frozenset[str]:
    if whole := _ONE.fullmatch(text):
        return frozenset(_letter(whole))
    text = re.sub(rf"{_AFTER}$|\.$", "", text)
    if _RUN.fullmatch(text):
        return frozenset(text) if len(set(text)) == len(text) else frozenset()
    parts = [_ONE.fullmatch(part) for part in _SEPARATOR.split(text)]
    return frozenset(_letter(part) for part in parts if part) if all(parts) else frozenset()


def _letter(match: re.Match[str]) -> str:
    return next(letter for letter in match.groups() if letter).upper()


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
