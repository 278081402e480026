"""Brings an answer to a plain form that can be compared as text or as an exact number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from r1engine.rewards.extract import matching_brace
from r1engine.rewards.math import chinese
from r1engine.rewards.math.angles import in_radians
from r1engine.rewards.math.characters import to_latex
from r1engine.rewards.math.families import with_parameter
from r1engine.rewards.math.markdown import without_markdown
from r1engine.rewards.math.notation import NOTATIONS
from r1engine.rewards.math.numerals import (
    STARTS,
    exact_number,
    spelled,
    spelled_in_chinese,
    sum_without_groups,
    without_groups,
    without_repeating,
)
from r1engine.rewards.math.phrases import take_phrase
from r1engine.rewards.math.structure import split
from r1engine.rewards.math.tex import tidy
from r1engine.rewards.math.units import named
from r1engine.rewards.math.words import with_commas, with_minus, without_label

_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT_COMMANDS = ("\\text", "\\textbf", "\\mathrm", "\\textrm", "\\mbox", "\\boxed", "\\fbox")
_LEADING = re.compile(r"(?:=|\\(?:approx|therefore|sim|rightarrow|Rightarrow|implies|to)(?![a-z]))\s*")
_PLAIN_NUMBER = re.compile(r"[+-]?[0-9]{1,50}(?:\.[0-9]{1,50})?")
_DOLLAR = re.compile(r"(?<!\\)\$")
_SIGNS = {"==": "=", "**": "^", ">=": "\\ge ", "<=": "\\le ", "!=": "\\neq "}
_KEYBOARD = re.compile(r"==|\*\*|[<>!]=")
_MARKED = re.compile(r"[\\~^_{}]")

# What may stand left of "=" without being a condition: x, x_1, f(x), AB, |AB|, \angle A, A:B, \frac{NO}{BO}, (x, y).
_SYMBOL = r"(?:[A-Za-z]|\\[a-z]{2,7}(?![a-z]))\s*(?:_(?:\{\w{1,9}\}|\w))?'{0,2}"
_NAME = rf"(?:\\(?:angle|triangle|text)\s*)?(?:{_SYMBOL}|[A-Z]{{2,4}}|\{{[\w ]{{1,40}}\}})(?:\s*\([\w, ]{{1,20}}\))?"
_NAME = rf"(?:{_NAME}|\|{_NAME}\||\\frac\{{{_NAME}\}}\{{{_NAME}\}}|\({_SYMBOL}(?:\s*,\s*{_SYMBOL}){{1,5}}\))"
# \\log_{2}(8) = 3 names nothing: it is true or false.
_NO_NUMBER = r"(?!\\(?:log|ln|lg|exp|sin|cos|tan|cot|sec|csc|sqrt)(?![a-z])[^=A-Za-z\\]*=)"
_NAMES = rf"{_NAME}(?:\s*:\s*{_NAME})?"
_ASSIGNMENT = re.compile(
    _NO_NUMBER + rf"(?:{_NAMES}|\{{?{_NAMES}\}}?)\s*(?:=|\\in(?![a-z])|:(?=\s*{_NAMES}=))\s*(?=[^=\s])"
)
_REVERSED = re.compile(r"([^=<>A-Za-z\\,]*\d)\s*=\s*([A-Za-z])")  # 5 = x
_IS_NAME = re.compile(rf"{_NO_NUMBER}(?:{_NAMES})=")


@dataclass(frozen=True)
class Answer:
    """A normalized answer."""

    text: str  # without its unit and without "x ="
    unit: str  # "" if none; "%" for percent, "degree", "dollar", or the words as written
    number: Fraction | None  # exact value of an integer, decimal or fraction
    equation: str = ""  # with "x =", where that was taken off
    qualifier: str = ""  # words that make the value another one, as "or more"

    @property
    def value(self) -> Fraction | None:
        """The exact number with percent taken as hundredths."""
        return self.number / 100 if self.number is not None and self.unit == "%" else self.number

    @property
    def name(self) -> str:
        """What stood left of "=", without spaces and \\text; "" if nothing did."""
        return re.sub(r"\\text|[{}\s]", "", self.equation[: len(self.equation) - len(self.text)]).rstrip("=:")


@lru_cache(maxsize=4096)  # a group of samples shares its reference, and often its answer
def normalize(answer: str) -> Answer:
    """Plain form of an answer: no delimiters, styling, spacing, "x =", final stop or unit; "and" is a comma."""
    # Each rule only where it can apply: most answers are plain numbers, and this runs for every completion.
    if _PLAIN_NUMBER.fullmatch(answer):
        return Answer(answer, "", exact_number(answer))
    text = unwrap(to_latex(without_markdown(answer.strip())).strip())
    if text.count("$") - text.count("\\$") in (2, 4, 6, 8):  # formulas in a sentence
        text = _DOLLAR.sub(" ", text).strip()
    if "=" in text or "*" in text:
        text = _KEYBOARD.sub(lambda match: _SIGNS[match[0]], text)
    if _MARKED.search(text):
        text = tidy(text)
    text = " ".join(text.split())
    text = "" if text == "$" else unwrap(text.rstrip(". ") if not text.endswith("..") else text).rstrip(",;").strip()
    text = with_minus(_plain_words(in_radians(sum_without_groups(without_repeating(text)))))
    for notation in NOTATIONS:
        text = notation(text)
    text = with_parameter(text)
    phrase = take_phrase(text)
    text = _without_approximation(with_commas(phrase.value))
    text, equation = _without_name(text)
    text = without_groups(text)
    return Answer(text, phrase.unit, exact_number(text), equation, phrase.qualifier)


def is_name(text: str) -> bool:
    """Whether `text` is what may stand left of "=": a variable, a function of one, a segment, a ratio of such."""
    return _IS_NAME.fullmatch(f"{text.strip()}=") is not None


def unwrap(text: str) -> str:
    """Takes off math delimiters, a text command or braces around everything, and "the answer is"."""
    while text[:1] and (text[0] in "$\\{=" or text[0].isalpha() or not text.isascii()):
        before = text
        if text[0] in "$\\":
            text = _without_text_command(_without_delimiters(text))
        if text[:1] == "{" and len(split(text[1:-1])) == 1 and matching_brace(text, 0) == len(text) - 1:
            text = text[1:-1].strip()
        if not text.isascii() or text[:1].isalpha():
            text = without_label(text)
        if text.startswith("\\text{") and (end := matching_brace(text, 5)) and (label := text[6:end]):
            rest = without_label(f"{label.rstrip()} {text[end + 1 :].lstrip()}")
            text = rest if text.endswith(rest) and len(rest) <= len(text) - end - 1 else text
        if text[:1] in ("=", "\\") and (sign := _LEADING.match(text)) and sign.end() < len(text):
            text = text[sign.end() :]
        if text == before:
            break
    return text


def _without_delimiters(text: str) -> str:
    for left, right in _DELIMITERS:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner.replace("\\$", ""):
            text = inner.strip()
    return text


def _without_text_command(text: str) -> str:
    for command in _TEXT_COMMANDS:
        if text.startswith(command + "{") and matching_brace(text, len(command)) == len(text) - 1:
            return text[len(command) + 1 : -1].strip()
    return text


_FIRST_WORD = re.compile(r"[A-Za-z]+")
_NUMERALS = (*chinese.DIGITS, *chinese.TENS, *chinese.MYRIADS, *chinese.NEGATIVES, chinese.POINT, chinese.PARTS_OF)
_CHINESE_NUMERALS = re.compile(f"[{''.join(_NUMERALS)}]+")


def _plain_words(text: str) -> str:
    """Digits for a number that is spelled out, alone or before what is counted."""
    if not text[:1].isalpha() or "(" in text:
        return text
    if not text[0].isascii():
        return _plain_chinese(text)
    first = _FIRST_WORD.match(text)
    if first is None or first[0].lower() not in STARTS:
        return text
    pieces = re.split(r"([\s-]+)", text)
    words = [piece.lower() for piece in pieces[::2]]
    for length in range(min(len(words), 12), 0, -1):
        if (value := spelled(words[:length])) is not None:
            return f"{value} {''.join(pieces[2 * length - 1 :]).strip(' -')}".strip()
    return text


def _plain_chinese(text: str) -> str:
    numerals = _CHINESE_NUMERALS.match(text)
    if numerals is None:
        return text
    rest = text[numerals.end() :]
    value = spelled_in_chinese(numerals[0])
    if value is None or (rest and named(rest) is None):
        return text
    return f"{value}{rest}"


def _without_approximation(text: str) -> str:
    """x = 1/3 \\approx 0.33 is x = 1/3; x \\approx 11 is 11."""
    exact, sign, rounded = text.partition("\\approx")
    if not sign or not exact.strip() or not rounded.strip():
        return text
    return rounded.strip() if is_name(exact) else exact.strip()


def _without_name(text: str) -> tuple[str, str]:
    """(what is right of "x =", all of it), or (text, "") if there is no such name; the rest may be a chain.

    A list keeps its names: each item has its own.
    """
    if "=" in text and (turned := _REVERSED.fullmatch(text)):
        text = f"{turned[2]}={turned[1]}"
    name = _ASSIGNMENT.match(text) if "=" in text or "\\in" in text else None
    if name is None:
        return text, ""
    value = text[name.end() :]
    is_list = len(split(text)) > 1 and without_groups(value) == value  # x = 1,234 is no list
    return (text, "") if is_list else (value, text)
