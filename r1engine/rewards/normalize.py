"""Brings an answer to a plain form that can be compared as text or as an exact number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1engine.rewards.extract import matching_brace

_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT_COMMANDS = ("\\text", "\\textbf", "\\mathrm", "\\mathbf", "\\textrm", "\\mbox")
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_PREFIX = re.compile(r"(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s+", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"[A-Za-z]\s*(?:=|\\in(?![a-z]))\s*(?=[^=])")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\frac\{(\d+)\}\{(\d+)\}|([+-]?)\\frac(\d)(\d)|([+-]?)(\d+)/(\d+)")
_MIXED = re.compile(r"([+-]?)(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|([+-]?)(\d+)\s+(\d+)/(\d+)")
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|~|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])")
_UNITS = (
    "mm|cm|km|meters?|metres?|centimeters?|kilometers?|in|inch|inches|ft|foot|feet|yards?|miles?|mg|kg|grams?|"
    "kilograms?|lbs?|pounds?|ounces?|sec|seconds?|min|minutes?|hours?|hrs?|days?|weeks?|months?|years?|degrees?|"
    "dollars?|cents?|units?|mph|km/h|m/s|liters?|litres?|people|students|ways|points|percent"
)
_WITH_UNIT = re.compile(
    r"(?P<number>.*[\d}])\s*"
    rf"(?:\\text\{{(?P<word>[^{{}}]*)\}}|(?<![a-zA-Z])(?P<known>(?:square |cubic )?(?:{_UNITS})))"
    r"(?P<power>\^\{?[23]\}?)?"
)


@dataclass(frozen=True)
class Answer:
    """A normalized answer."""

    text: str  # without its unit
    unit: str  # "" if none; "%" for percent, "degree", "dollar", or the word as written
    number: Fraction | None  # exact value of an integer, decimal or fraction

    @property
    def value(self) -> Fraction | None:
        """The exact number with percent taken as hundredths."""
        return self.number / 100 if self.number is not None and self.unit == "%" else self.number


def normalize(answer: str) -> Answer:
    """Plain form of an answer: delimiters, spacing, "x =", a final stop and the unit are taken off."""
    text = unwrap(answer.strip())
    text = text.replace("\u2212", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\mathrm\s*\{?\s*e\s*\}?", "e", text)  # Math-Verify drops \mathrm{e}
    text = re.sub(r"\\sqrt\s*(\d|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
    text = " ".join(_SPACING.sub(" ", text).split())
    text = unwrap(text.rstrip(".") if not text.endswith("..") else text)
    text, unit = _take_unit(text)
    if name := _ASSIGNMENT.match(text):
        text = text[name.end() :]
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    return Answer(text, unit, exact_number(text))


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


def unwrap(text: str) -> str:
    """Takes off math delimiters, a text command around everything and "the answer is"."""
    while True:
        before = text
        for left, right in _DELIMITERS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
                text = inner.strip()
        for command in _TEXT_COMMANDS:
            if text.startswith(command + "{") and matching_brace(text, len(command)) == len(text) - 1:
                text = text[len(command) + 1 : -1].strip()
        if prefix := _PREFIX.match(text):
            text = text[prefix.end() :]
        if text == before:
            return text


def _take_unit(text: str) -> tuple[str, str]:
    """(text without its unit, unit)."""
    for sign in ("\\%", "%"):
        if text.endswith(sign):
            return text[: -len(sign)].strip(), "%"
    for sign in ("^\\circ", "^{\\circ}", "\u00b0"):
        if text.endswith(sign):
            return text[: -len(sign)].strip(), "degree"
    for sign in ("\\$", "$"):
        if text.startswith(sign):
            return text[len(sign) :].strip(), "dollar"
    match = _WITH_UNIT.fullmatch(text)
    if match is None:
        return text, ""
    unit = " ".join((match["word"] or match["known"] or "").lower().rstrip(".").split())
    unit = {"percent": "%", "degrees": "degree", "dollars": "dollar"}.get(unit, unit)
    return match["number"].strip(), unit + (match["power"] or "").replace("{", "").replace("}", "")
