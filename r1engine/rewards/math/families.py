"""Families of values with an integer parameter: k\\pi with k in Z is n\\pi with n in Z."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from r1engine.rewards.math import chinese
from r1engine.rewards.math.words import any_of

if TYPE_CHECKING:
    from r1engine.rewards.math.decision import Comparer, Decision
    from r1engine.rewards.math.normalize import Answer

PARAMETER = {"Z": "\\nu_{0}", "N": "\\nu_{1}"}  # what a declared parameter is written as; nobody else writes that

_SET = (
    r"(?:\\mathbb\{(?P<set>[ZN])\}(?:\s*[\^_]\{?[+*]\}?)?|(?P<bare>[ZN])(?:\s*[\^_]\{?[+*]\}?)?"
    r"|(?:set of )?(?:positive |nonnegative )?integers?|natural numbers?)"
)
_DECLARED = re.compile(
    r"[\s,;(]*(?:(?:where|for|with|and|\\forall)\s+)*(?:(?:all|any|some|every|each|arbitrary|an?)\s+)*"
    rf"(?:integers?\s+(?P<last>[a-z])|(?P<letter>[a-z])\s*(?:\\in|is|are|in|:)?\s*(?:(?:the|an?|any|all)\s+)*{_SET})\s*\)?$"
    rf"|[\s,;(]*(?P<chinese>[a-z])\s*{any_of(chinese.INTEGER_DECLARED)}\s*\)?$"
)
_LETTER = re.compile(r"(?<![A-Za-z\\])[klmnjt](?![A-Za-z])")


def with_parameter(text: str) -> str:
    """k\\pi, k \\in \\mathbb{Z} with its parameter under the common name, and without the declaration."""
    if not ("Z" in text or "N" in text or "integer" in text or chinese.INTEGER in text):
        return text
    plain = re.sub(r"\\text\{([^{}]*)\}|\$", r" \1 ", text)
    match = _DECLARED.search(plain)
    if match is None or not match.start():
        return text
    letter = match["last"] or match["letter"] or match["chinese"]
    name = PARAMETER["N" if "N" in (match["set"], match["bare"]) or "natural" in match[0] else "Z"]
    family = plain[: match.start()].strip()
    renamed = _renamed(family, letter, name)
    return renamed if renamed != family else text


def _renamed(text: str, letter: str, name: str) -> str:
    return re.sub(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", lambda _: name + " ", text)


def families(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """Families in \\pi with different letters for the parameter, of which nobody need have said that it is whole."""
    if "\\pi" not in answer.text or "\\pi" not in reference.text:
        return None
    found, required = (_parameter(side.text) for side in (answer, reference))
    if found is None or required is None or found == required:
        return None
    sides = [
        replace(
            side,
            text=side.text.replace(name, PARAMETER["Z"])
            if name[0] == "\\"
            else _renamed(side.text, name, PARAMETER["Z"]),
        )
        for side, name in ((answer, found), (reference, required))
    ]
    return judge.compare(*sides)


def _parameter(text: str) -> str | None:
    """The name of the only parameter, declared or by its letter; None if there is none or several."""
    names = {name for name in PARAMETER.values() if name in text} | set(_LETTER.findall(text))
    return next(iter(names)) if len(names) == 1 else None


def same_family(expected: Any, found: Any) -> tuple[Literal["right", "wrong"], str] | None:
    """(verdict, reason) of two SymPy expressions that are linear in one declared integer; None for others.

    a + b n is the family c + d n if d = \\pm b and c - a is a whole multiple of b.
    """
    from sympy import Expr, simplify

    if not (isinstance(expected, Expr) and isinstance(found, Expr)):
        return None
    symbols = expected.free_symbols | found.free_symbols
    if len(symbols) != 1 or "nu" not in str(next(iter(symbols))):
        return None
    n = symbols.pop()
    first, second = expected.subs(n, 0), found.subs(n, 0)
    step, other = expected.diff(n), found.diff(n)
    if step.free_symbols or other.free_symbols or step == 0:
        return None
    same_step = simplify(step - other) == 0 or simplify(step + other) == 0
    if same_step and simplify((second - first) / step).is_integer:
        return "right", "the same family"
    return "wrong", "another family"
