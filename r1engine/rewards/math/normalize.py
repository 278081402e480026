"""Brings an answer to a plain form that can be compared as text or as an exact number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1engine.rewards.extract import matching_brace
from r1engine.rewards.math.units import take_unit

_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT_COMMANDS = ("\\text", "\\textbf", "\\mathrm", "\\mathbf", "\\textrm", "\\mbox")
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_PREFIX = re.compile(r"(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s+", re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\frac\{(\d+)\}\{(\d+)\}|([+-]?)\\frac(\d)(\d)|([+-]?)(\d+)/(\d+)")
_MIXED = re.compile(r"([+-]?)(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|([+-]?)(\d+)\s+(\d+)/(\d+)")
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|~|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])")
_AND = re.compile(r"\s*,?\s*(?:\\(?:text|mbox|textrm)\{\s*,?\s*(?:and|or)\s*\}|(?<![\w\\])(?:and|or)(?!\w))\s*,?\s*")

# What may stand left of "=" without being a condition: x, x_1, f(x), AB, |AB|, \angle A, A:B, \frac{NO}{BO}, (x, y).
_SYMBOL = r"(?:[A-Za-z]|\\[a-z]{2,7}(?![a-z]))(?:_(?:\{\w{1,9}\}|\w))?'{0,2}"
_NAME = rf"(?:\\(?:angle|triangle|text)\s*)?(?:{_SYMBOL}|[A-Z]{{2,4}}|\{{[\w ]{{1,40}}\}})(?:\s*\([\w, ]{{1,20}}\))?"
_NAME = rf"(?:{_NAME}|\|{_NAME}\||\\frac\{{{_NAME}\}}\{{{_NAME}\}}|\({_SYMBOL}(?:\s*,\s*{_SYMBOL}){{1,5}}\))"
_NAMES = rf"{_NAME}(?:\s*:\s*{_NAME})?"
_ASSIGNMENT = re.compile(rf"(?:{_NAMES}|\{{?{_NAMES}\}}?)\s*(?:=|\\in(?![a-z])|:(?=\s*{_NAMES}=))\s*(?=[^=\s])")
_IS_NAME = re.compile(_NAMES)


@dataclass(frozen=True)
class Answer:
    """A normalized answer."""

    text: str  # without its unit and without "x ="
    unit: str  # "" if none; "%" for percent, "degree", "dollar", or the word as written
    number: Fraction | None  # exact value of an integer, decimal or fraction
    equation: str = ""  # with "x =", where that was taken off

    @property
    def value(self) -> Fraction | None:
        """The exact number with percent taken as hundredths."""
        return self.number / 100 if self.number is not None and self.unit == "%" else self.number


def normalize(answer: str) -> Answer:
    """Plain form of an answer: no delimiters, spacing, "x =", final stop or unit; "and" is a comma."""
    text = unwrap(answer.strip())
    text = text.replace("\u2212", "-").replace("\u2248", "\\approx ").replace("==", "=")
    # Each rule only where it can apply: most answers are plain numbers, and this runs for every completion.
    if "\\" in text or "~" in text:
        text = _plain_latex(text)
    text = " ".join(text.split())
    text = unwrap(text.rstrip(".") if not text.endswith("..") else text)
    if "and" in text or "or" in text:
        text = _AND.sub(", ", text)
    text = _without_approximation(text)
    text, unit = take_unit(text)
    text, equation = _without_name(text)
    if "," in text and _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    return Answer(text, unit, exact_number(text), equation)


def exact_number(text: str) -> Fraction | None:
    """Exact value of an integer, decimal or fraction, as -3, 0.25, 1/4, 1 1/2, \\frac{1}{4}; None for anything else."""
    text = text.replace(" ", "") if re.match(r"[+-]\s", text) else text
    if len(text) > 1000:  # Python refuses int() beyond 4,300 digits, and no answer is that long
        return None
    if re.fullmatch(_NUMBER, text, re.ASCII):
        return Fraction(text)
    match = _MIXED.fullmatch(text) or _FRACTION.fullmatch(text)
    if match is None or not text.isascii():  # \d also matches the digits of other scripts
        return None
    sign, *whole, above, below = (part for part in match.groups() if part is not None)
    if int(below) == 0:
        return None
    return (int(whole[0] if whole else 0) + Fraction(int(above), int(below))) * (-1 if sign == "-" else 1)


def is_name(text: str) -> bool:
    """Whether `text` is what may stand left of "=": a variable, a function of one, a segment, a ratio of such."""
    return _IS_NAME.fullmatch(text.strip()) is not None


def unwrap(text: str) -> str:
    """Takes off math delimiters, a text command around everything and "the answer is"."""
    while text[:1] in ("$", "\\") or text[:1].isalpha():
        before = text
        for left, right in _DELIMITERS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
                text = inner.strip()
        for command in _TEXT_COMMANDS:
            if text.startswith(command + "{") and matching_brace(text, len(command)) == len(text) - 1:
                text = text[len(command) + 1 : -1].strip()
        if text[:1].isalpha() and (prefix := _PREFIX.match(text)):
            text = text[prefix.end() :]
        if text == before:
            break
    return text


def _plain_latex(text: str) -> str:
    for variant in ("\\dfrac", "\\tfrac", "\\cfrac"):
        text = text.replace(variant, "\\frac")
    if "\\mathrm" in text:
        text = re.sub(r"\\mathrm\s*\{?\s*e\s*\}?", "e", text)  # Math-Verify drops \mathrm{e}
    if "\\sqrt" in text:
        text = re.sub(r"\\sqrt\s*(\d|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
    return _SPACING.sub(" ", text)


def _without_approximation(text: str) -> str:
    """x = 1/3 \\approx 0.33 is x = 1/3; x \\approx 11 is 11."""
    exact, sign, rounded = text.partition("\\approx")
    if not sign or not exact.strip() or not rounded.strip():
        return text
    return rounded.strip() if is_name(exact) else exact.strip()


def _without_name(text: str) -> tuple[str, str]:
    """(what is right of "x =", all of it), or (text, "") if there is no such name; the rest may be a chain."""
    name = _ASSIGNMENT.match(text) if "=" in text or "\\in" in text else None
    return (text[name.end() :], text) if name else (text, "")
