"""The accuracy rule: compares an answer with the reference, exactly where that is possible.

Math-Verify is asked only what text and exact numbers do not settle, and its known false positives (units,
percent, number bases, tuple against set, tiny numbers) are kept from it or checked again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from r1engine.rewards.extract import MAX_ANSWER_CHARACTERS
from r1engine.rewards.normalize import Answer, normalize
from r1engine.rewards.record import Verdict
from r1engine.rewards.symbolic import compare_symbolically

Compute = Callable[[str, str], tuple[Verdict, str]]  # (answer, reference) -> (verdict, reason)

MAX_UNORDERED = 50  # matching the items of two sets is quadratic

_ELLIPSIS = re.compile(r"\\[cl]?dots|\.\.\.|\u2026")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'.-]+(?:\s+[A-Za-z'.-]+)*")
_CHOICE = re.compile(r"\(?([A-J])[.):]?")
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|lt|gt|ne|neq)(?![a-z])")
_INEQUALITY = re.compile(r"<|>|\\(?:le|ge|leq|geq|lt|gt)(?![a-z])")
_OPEN, _CLOSE = "([{", ")]}"


class _NeedsComputing(Exception):
    """Text and exact numbers do not settle it."""


def judge_at_once(answer: str, reference: str) -> tuple[Verdict, str] | None:
    """`judge` as far as text and exact numbers go, in microseconds; None where Math-Verify is to be asked."""

    def refuse(answer: str, reference: str) -> NoReturn:
        raise _NeedsComputing

    try:
        return judge(answer, reference, compute=refuse)
    except _NeedsComputing:
        return None


def judge(answer: str, reference: str, *, compute: Compute = compare_symbolically) -> tuple[Verdict, str]:
    """(verdict, reason in one line) of an answer.

    In this order: equal text; equal exact numbers (integers, decimals, fractions; decimals are not rounded); choice
    letters and words as text; sets, tuples, intervals and lists item by item (a bare list may stand for a set or a
    tuple); anything else by Math-Verify.

    - A unit may be missing on one side. Two different units are undecided: 1 m may well be 100 cm.
    - 10% is 0.1. Whether 10% is 10 depends on the question: undecided.
    - A set is not a tuple; an interval against an inequality is undecided.
    - An answer that cannot be read is wrong; a reference that cannot be read makes it undecided.
    - Too large to compute safely (length, towers of powers, factorials) is undecided. Size bounds do not bound time:
      an input within them can still keep Math-Verify busy for seconds.

    `compute` is asked about what only algebra settles.
    """
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARACTERS:
        return "undecided", f"longer than {MAX_ANSWER_CHARACTERS} characters"
    found, required = normalize(answer), normalize(reference)
    if not required.text:
        return "undecided", "the reference is blank"
    if not found.text:  # also "$" or ".", of which normalizing leaves nothing
        return "wrong", "the answer is blank"
    return _compare(found, required, compute)


def _compare(answer: Answer, reference: Answer, compute: Compute) -> tuple[Verdict, str]:
    if answer.unit != reference.unit and (decided := _compare_units(answer, reference, compute)) is not None:
        return decided
    if answer.text == reference.text:
        return "right", "same text"
    if answer.number is not None and reference.number is not None:
        if answer.number == reference.number:
            return "right", "same number"
        return "wrong", f"{answer.text} is not {reference.text}"[:120]
    for rule in (_compare_as_text, _compare_bases):
        if (decided := rule(answer.text, reference.text)) is not None:
            return decided
    if (decided := _compare_collections(answer.text, reference.text, compute)) is not None:
        return decided
    return compute(answer.text, reference.text)


def _compare_units(answer: Answer, reference: Answer, compute: Compute) -> tuple[Verdict, str] | None:
    """What differing units settle; None if they may be ignored."""
    if "%" in (answer.unit, reference.unit):
        if answer.value is not None and answer.value == reference.value:
            return "right", "same number, one as percent"
        if answer.number is not None and answer.number == reference.number:
            return "undecided", "the same number with and without percent"
        if answer.number is not None and reference.number is not None:
            return "wrong", "another number, one as percent"
        verdict, reason = _compare(replace(answer, unit=""), replace(reference, unit=""), compute)
        return ("undecided", "the same value with and without percent") if verdict == "right" else (verdict, reason)
    if answer.unit and reference.unit:
        return "undecided", f"units differ: {answer.unit} and {reference.unit}"[:120]
    return None


def _compare_as_text(answer: str, reference: str) -> tuple[Verdict, str] | None:
    """References that are no formula: a choice letter, words, a pattern with an ellipsis."""
    if choice := _CHOICE.fullmatch(reference):
        found = _CHOICE.fullmatch(answer)
        return _yes_no(found is not None and found[1] == choice[1], "choice letter")
    if _ELLIPSIS.search(reference):
        same = answer.replace(" ", "") == reference.replace(" ", "")
        return ("right", "same text") if same else ("undecided", "the reference is a pattern with an ellipsis")
    if _ELLIPSIS.search(answer):
        return "wrong", "an ellipsis is no answer"
    if _WORDS.fullmatch(reference):
        if _letters(answer) == _letters(reference):
            return "right", "same words"
        if not (len(reference) <= 3 and reference.isalpha()):
            return "wrong", "other words"
        if answer.isalpha():  # `cat` is a word or a product; as a product `act` is the same
            is_permuted = sorted(answer) == sorted(reference)
            return ("undecided", "the same letters in another order") if is_permuted else ("wrong", "other letters")
    if re.search(r"\d\s+\d", answer):  # Math-Verify reads 1 2 3 4 as a sum
        return "wrong", "several numbers side by side"
    return None


def _compare_bases(answer: str, reference: str) -> tuple[Verdict, str] | None:
    """Numbers with a base, such as 12_3; Math-Verify drops the base."""
    found, required = _BASED.fullmatch(answer), _BASED.fullmatch(reference)
    has_digits = [match is not None and match[1][-1].isdigit() for match in (found, required)]
    if not any(has_digits):
        return None
    if all(has_digits):
        same = found[2] == required[2] and found[1].lstrip("0") == required[1].lstrip("0")
        return _yes_no(same, "number with a base")
    digits = (found or required)[1]
    if digits == (reference if found else answer):
        return "undecided", "the same digits with and without a base"
    return "wrong", "another number, one with a base"


def _compare_collections(answer: str, reference: str, compute: Compute) -> tuple[Verdict, str] | None:
    """Sets, tuples, intervals and lists; None if the reference is none of them."""
    kinds = kind, required_kind = _kind(answer), _kind(reference)
    is_range = kind in ("interval", "pair") or required_kind in ("interval", "pair")
    if is_range and "relation" in kinds and _INEQUALITY.search(answer + reference):
        return "undecided", "an interval against an inequality"
    if required_kind in ("other", "relation"):
        # +-1 stands for two values.
        is_single = kind in ("other", "relation") or "\\pm" in reference
        return None if is_single else ("wrong", f"found {kind}, required a single value")
    if (kind != required_kind and "list" not in kinds) or set(kinds) == {"interval", "list"}:
        return "wrong", f"found {'a single value' if kind in ('other', 'relation') else kind}, required {required_kind}"
    if "interval" in kinds and (answer[0], answer[-1]) != (reference[0], reference[-1]):
        return "wrong", "the ends of the interval differ"
    items = [normalize(item) for item in _items(answer, kind)]
    required = [normalize(item) for item in _items(reference, required_kind)]
    if len(items) != len(required):
        return "wrong", f"{len(items)} items, required {len(required)}"
    if "pair" in kinds or "interval" in kinds:
        return _all_of([_compare(a, b, compute) for a, b in zip(items, required, strict=True)])
    return _compare_unordered(items, required, compute)


def _compare_unordered(items: list[Answer], required: list[Answer], compute: Compute) -> tuple[Verdict, str]:
    if len(items) > MAX_UNORDERED:
        return "undecided", f"more than {MAX_UNORDERED} items"
    left, undecided = list(required), ""
    for item in items:
        results = [_compare(item, other, compute) for other in left]
        verdicts = [verdict for verdict, _ in results]
        if "right" in verdicts:
            del left[verdicts.index("right")]
        elif "undecided" in verdicts:
            undecided = results[verdicts.index("undecided")][1]
        else:
            return "wrong", f"the item {item.text} is not in the reference"[:120]
    return ("undecided", undecided) if undecided else ("right", "same items")


def _all_of(results: list[tuple[Verdict, str]]) -> tuple[Verdict, str]:
    """Wrong if any item is, else undecided if any is, else right."""
    for verdict in ("wrong", "undecided"):
        for result in results:
            if result[0] == verdict:
                return result
    return "right", "same items"


def _kind(text: str) -> str:
    """set, pair (a tuple or an open interval: both are written (1, 2)), interval, list, relation or other."""
    is_enclosed = _closing(text) == len(text) - 1
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if is_enclosed and len(_split(text[1:-1])) > 1:
        if text[0] == "(" and text[-1] == ")":
            return "pair"
        if text[0] in "([" and text[-1] in ")]":
            return "interval"
        return "set"  # {1, 2}
    if len(_split(text)) > 1:
        return "list"
    return "relation" if _RELATION.search(text) else "other"


def _items(text: str, kind: str) -> list[str]:
    inside = {"set": text[2:-2] if text.startswith("\\{") else text[1:-1], "list": text}.get(kind, text[1:-1])
    return [item for item in _split(inside) if item.strip()]


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _closing(text: str) -> int:
    """Position where the bracket that `text` starts with is closed; -1 if it starts with none or is not closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return position if text[0] in _OPEN else -1
    return -1


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _yes_no(is_same: bool, how: str) -> tuple[Verdict, str]:
    return ("right", f"same {how}") if is_same else ("wrong", f"another {how}")
