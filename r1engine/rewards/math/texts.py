"""Rules for answers that are no formula: words, choice letters, patterns, numbers with a base, ratios and times."""

from __future__ import annotations

import re

from r1engine.rewards.math.decision import Comparer, Decision, yes_no
from r1engine.rewards.math.normalize import Answer
from r1engine.rewards.math.numerals import exact_number
from r1engine.rewards.math.phrases import CLOCK
from r1engine.rewards.math.words import CJK, EMPTY, meaning

ELLIPSIS = re.compile(r"\\[cl]?dots|\.\.\.|\u2026")
BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
WORDS = re.compile(rf"[A-Za-z{CJK}][A-Za-z'.{CJK}-]+(?:\s+[A-Za-z'.{CJK}-]+)*|[{CJK}]")
CHOICE = re.compile(r"\(?([A-J])[.):]?")
_SPACES = re.compile(r"(?<!\w) +| +(?!\w)")
_SENTENCE = re.compile(rf"[A-Za-z]+(?: [A-Za-z]+)+|[A-Za-z]{{5,}}|[{CJK}]+")


def is_text(text: str) -> bool:
    """Whether a reference can be compared as text."""
    is_word = any(rule.fullmatch(text) for rule in (EMPTY, CHOICE, WORDS, BASED))
    return is_word or meaning(text) in ("infinity", "-infinity")


def same_text(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """Equal character for character, but for spaces that part neither words nor digits."""
    same = answer.text == reference.text or _SPACES.sub("", answer.text) == _SPACES.sub("", reference.text)
    return ("right", "same text") if same else None


def words(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """References that are no formula: nothing, a choice letter, words, a pattern with an ellipsis."""
    found, required = answer.text, reference.text
    if reference.number is not None and _SENTENCE.fullmatch(found):
        return "wrong", "words, required a number"  # Math-Verify takes them for a product of letters
    if EMPTY.fullmatch(required):
        return yes_no(EMPTY.fullmatch(found) is not None, "empty answer")
    if meaning(found) == meaning(required) and not (len(found) == len(required) == 1):
        return "right", "same words"
    if choice := CHOICE.fullmatch(required):
        match = CHOICE.fullmatch(found)
        if meaning(found) != meaning(required):
            return yes_no(match is not None and match[1] == choice[1], "choice letter")
    if ELLIPSIS.search(required):
        same = found.replace(" ", "") == required.replace(" ", "")
        return ("right", "same text") if same else ("undecided", "the reference is a pattern with an ellipsis")
    if ELLIPSIS.search(found):
        return "wrong", "an ellipsis is no answer"
    if WORDS.fullmatch(required):
        return _words(found, required)
    if re.search(r"\d\s+\d", found):  # Math-Verify reads 1 2 3 4 as a sum
        return "wrong", "several numbers side by side"
    return None


def _words(found: str, required: str) -> Decision | None:
    if _letters(found) == _letters(required):
        return "right", "same words"
    if not (len(required) <= 3 and required.isascii() and required.isalpha()):
        return "wrong", "other words"
    if found.isalpha():  # `cat` is a word or a product; as a product `act` is the same
        is_permuted = sorted(found) == sorted(required)
        return ("undecided", "the same letters in another order") if is_permuted else ("wrong", "other letters")
    return None


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def bases(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """Numbers with a base, such as 12_3; Math-Verify drops the base."""
    if "_" not in answer.text + reference.text:
        return None
    found, required = BASED.fullmatch(answer.text), BASED.fullmatch(reference.text)
    has_digits = [match is not None and match[1][-1].isdigit() for match in (found, required)]
    based = found or required
    if based is None or not any(has_digits):
        return None
    if found is not None and required is not None and all(has_digits):
        same = found[2] == required[2] and found[1].lstrip("0") == required[1].lstrip("0")
        return yes_no(same, "number with a base")
    digits = based[1]
    if digits == (reference.text if found else answer.text):
        return "undecided", "the same digits with and without a base"
    return "wrong", "another number, one with a base"


def ratios(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """a:b and a:b:c by their quotients, 3:45 also as a time of day. Math-Verify divides from left to right."""
    if ":" not in answer.text or ":" not in reference.text:
        return None
    found, required = CLOCK.fullmatch(answer.text), CLOCK.fullmatch(reference.text)
    if found is not None and required is not None:
        if (int(found[1]), found[2]) == (int(required[1]), required[2]):
            halves = [(match[3] or "").lower() for match in (found, required)]
            return yes_no("" in halves or halves[0] == halves[1], "time")
        if found[3] or required[3]:
            return "wrong", "another time"
    parts = [
        [value for part in side.text.split(":") if (value := exact_number(part.strip())) is not None]
        for side in (answer, reference)
    ]
    if not len(parts[0]) == len(parts[1]) == answer.text.count(":") + 1 == reference.text.count(":") + 1:
        return None
    if any(not value for value in (*parts[0], *parts[1])):
        return yes_no(parts[0] == parts[1], "ratio or time")
    quotients = [[value / side[0] for value in side] for side in parts]
    if quotients[0] != quotients[1]:
        return "wrong", "another ratio"
    is_clock = found is not None and required is not None
    return ("undecided", "the same ratio, but another time") if is_clock else ("right", "same ratio")
