"""The accuracy rule: compares an answer with the reference, exactly where that is possible.

Math-Verify is asked only what text and exact numbers do not settle, and its known false positives (units,
percent, number bases, tuple against set, tiny numbers, false chains of equations) are kept from it or checked again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NoReturn

from r1engine.rewards.extract import MAX_ANSWER_CHARACTERS
from r1engine.rewards.math.normalize import Answer, is_name, normalize
from r1engine.rewards.math.structure import chain, has_inequality, has_relation, items, kind
from r1engine.rewards.math.symbolic import compare_symbolically, reading_problem
from r1engine.rewards.math.units import ratio
from r1engine.rewards.record import Verdict

Decision = tuple[Verdict, str]  # verdict and reason in one line
Compute = Callable[[str, str], Decision]  # of two plain expressions: answer, reference

MAX_UNORDERED = 50  # matching the items of two sets is quadratic
MIN_ROUNDED_PLACES = 5  # decimal places from which a rounded answer stands for the exact number

_ELLIPSIS = re.compile(r"\\[cl]?dots|\.\.\.|\u2026")
_INTEGER = re.compile(r"[+-]?[0-9]{1,50}")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'.-]+(?:\s+[A-Za-z'.-]+)*")
_SENTENCE = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)+|[A-Za-z]{5,}")
_CHOICE = re.compile(r"\(?([A-J])[.):]?")
_EMPTY = re.compile(
    r"\\emptyset|\\varnothing|\\\{\s*\\\}|(?:there (?:is|are) )?no (?:real |such |integer |valid )?"
    r"(?:solutions?|roots?|values?|numbers?)(?: exists?)?|none|empty set|the empty set",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class MathPolicy:
    """What the question, which no rule sees, would have to settle. The defaults leave it undecided."""

    percent_may_be_missing: bool = False  # 10% and 10 are the same
    interval_may_be_inequality: bool = False  # (3, \infty) and x > 3 are the same


STRICT = MathPolicy()


class _NeedsComputing(Exception):
    """Text and exact numbers do not settle it."""


def judge_at_once(answer: str, reference: str, policy: MathPolicy = STRICT) -> Decision | None:
    """`judge` as far as text and exact numbers go, in microseconds; None where Math-Verify is to be asked."""

    def refuse(answer: str, reference: str) -> NoReturn:
        raise _NeedsComputing

    try:
        return judge(answer, reference, policy, compute=refuse)
    except _NeedsComputing:
        return None


def judge(
    answer: str, reference: str, policy: MathPolicy = STRICT, *, compute: Compute = compare_symbolically
) -> Decision:
    """(verdict, reason in one line) of an answer.

    In this order: equal text; equal exact numbers (integers, decimals, fractions); choice letters and words as text;
    chains of equations; sets, tuples, vectors, intervals and lists item by item (a bare list may stand for a set or
    a tuple); anything else by `compute`.

    - A decimal with MIN_ROUNDED_PLACES places is right if it is the reference rounded to those places.
    - A unit may be missing on one side. Units of one kind are converted, unknown ones are undecided.
    - 10% is 0.1. Whether 10% is 10, and whether an interval may be written as an inequality, is a matter of `policy`.
    - A set is not a tuple. Every member of a chain a = b = c must equal the reference.
    - An answer that cannot be read is wrong; a reference that cannot be read makes it undecided.
    - Too large to compute safely (length, towers of powers, factorials) is undecided. Size bounds do not bound time:
      an input within them can still keep Math-Verify busy for seconds.
    """
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARACTERS:
        return "undecided", f"longer than {MAX_ANSWER_CHARACTERS} characters"
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):  # by far the most frequent; without any copy
        is_same = int(answer) == int(reference)
        return ("right", "same number") if is_same else ("wrong", f"{answer} is not {reference}")
    found, required = normalize(answer), normalize(reference)
    if not required.text:
        return "undecided", "the reference is blank"
    if not found.text:  # also "$" or ".", of which normalizing leaves nothing
        return "wrong", "the answer is blank"
    return _Judge(policy, compute).compare(found, required)


def reference_problem_at_once(reference: str) -> str | None:
    """`reference_problem` as far as text goes; None where Math-Verify is to be asked."""

    def refuse(expression: str) -> NoReturn:
        raise _NeedsComputing

    try:
        return reference_problem(reference, readable=refuse)
    except _NeedsComputing:
        return None


def reference_problem(reference: str, *, readable: Callable[[str], str] = reading_problem) -> str:
    """Why every answer to this reference would be undecided, or "" if it can be used.

    `readable` says the same of a plain expression.
    """
    if len(reference) > MAX_ANSWER_CHARACTERS:
        return f"is longer than {MAX_ANSWER_CHARACTERS} characters"
    plain = normalize(reference)
    if not plain.text:
        return "is blank"
    if _ELLIPSIS.search(plain.text):
        return "is a pattern with an ellipsis"
    is_text = any(rule.fullmatch(plain.text) for rule in (_EMPTY, _CHOICE, _WORDS, _BASED))
    if plain.number is not None or is_text:
        return ""
    if kind(plain.text) not in ("other", "relation"):
        problems = [reference_problem(item, readable=readable) for item in items(plain.text, kind(plain.text))]
        return next((problem for problem in problems if problem), "")
    last = normalize(chain(plain.text)[-1])
    return "" if last.number is not None else readable(plain.text)


@dataclass(frozen=True)
class _Judge:
    policy: MathPolicy
    compute: Compute

    def compare(self, answer: Answer, reference: Answer) -> Decision:
        if answer.unit != reference.unit and (decided := self._units(answer, reference)) is not None:
            return decided
        if answer.text == reference.text:
            return "right", "same text"
        if answer.number is not None and reference.number is not None:
            return _numbers(answer, reference)
        if reference.number is not None and _SENTENCE.fullmatch(answer.text):
            return "wrong", "words, required a number"  # Math-Verify takes them for a product of letters
        for rule in (_as_text, _bases):
            if (decided := rule(answer.text, reference.text)) is not None:
                return decided
        for method in (self._chains, self._collections):
            if (decided := method(answer, reference)) is not None:
                return decided
        # y = 2x against y - 2x = 0: only one of them lost its "y =".
        if has_relation(answer.text) != has_relation(reference.text):
            answer, reference = _with_name(answer), _with_name(reference)
            if has_relation(answer.text) != has_relation(reference.text):
                return "wrong", "a condition against a value"
        return self.compute(answer.text, reference.text)

    def _units(self, answer: Answer, reference: Answer) -> Decision | None:
        """What differing units settle; None if they may be ignored."""
        units = {answer.unit, reference.unit}
        plain = replace(answer, unit=""), replace(reference, unit="")
        if "%" in units:
            return self._percent(answer, reference, *plain)
        if units == {"degree", ""} and "\\pi" in (reference if answer.unit else answer).text:
            turned = [f"({a.text})\\cdot\\frac{{\\pi}}{{180}}" if a.unit else a.text for a in (answer, reference)]
            return self.compute(*turned)
        if "" in units:
            return None
        factor = ratio(answer.unit, reference.unit)
        if factor is None:
            verdict, reason = self.compare(*plain)
            different = f"units differ: {answer.unit} and {reference.unit}"[:120]
            return (verdict, reason) if verdict == "wrong" and answer.number is not None else ("undecided", different)
        if factor == 0:
            return "wrong", f"{answer.unit} measures something else than {reference.unit}"
        if answer.number is not None and reference.number is not None:
            return _yes_no(answer.number * factor == reference.number, "measure")
        return self.compute(f"({answer.text})\\cdot({factor})", reference.text)

    def _percent(self, answer: Answer, reference: Answer, plain: Answer, plain_reference: Answer) -> Decision:
        if answer.value is not None and answer.value == reference.value:
            return "right", "same number, one as percent"
        verdict, reason = self.compare(plain, plain_reference)
        if verdict == "right" and not self.policy.percent_may_be_missing:
            what = "number" if answer.number is not None else "value"
            return "undecided", f"the same {what} with and without percent"
        return verdict, reason

    def _chains(self, answer: Answer, reference: Answer) -> Decision | None:
        """a = b = c. The last member of a reference counts, but every member of an answer must be right."""
        required, members = chain(reference.text), chain(answer.text)
        if len(required) > 1 and (reference.equation or len(required) > 2):
            last = normalize(required[-1])
            return self.compare(answer, last) if last.number is not None else None
        states_values = len(members) > 2 or answer.equation or _is_numeric(members)
        if len(members) < 2 or len(required) > 1 or not states_values:
            return None
        members = [member for member in members if member and not is_name(member)]
        return _all_of([self.compare(normalize(member), reference) for member in members])

    def _collections(self, answer: Answer, reference: Answer) -> Decision | None:
        """Sets, tuples, vectors, intervals and lists; None if the reference is none of them."""
        kinds = shape, required_shape = kind(answer.text), kind(reference.text)
        sides = (shape, answer), (required_shape, reference)
        if kinds in (("vector", "pair"), ("pair", "vector")):
            return self._ordered(answer, reference)
        if "vector" in kinds:
            return None
        is_range = [shape_ in ("interval", "pair") or "\\cup" in side.text for shape_, side in sides]
        if "relation" in kinds and any(is_range) and has_inequality(answer.text + reference.text):
            return self._interval(answer, reference)
        if required_shape in ("other", "relation"):
            # +-1 stands for two values.
            is_single = shape in ("other", "relation") or "\\pm" in reference.text
            return None if is_single else ("wrong", f"found {shape}, required a single value")
        if (shape != required_shape and "list" not in kinds) or set(kinds) == {"interval", "list"}:
            found = "a single value" if shape in ("other", "relation") else shape
            return ("wrong", f"found {found}, required {required_shape}") if "\\pm" not in answer.text else None
        if "interval" in kinds and (answer.text[0], answer.text[-1]) != (reference.text[0], reference.text[-1]):
            return "wrong", "the ends of the interval differ"
        if "pair" in kinds or "interval" in kinds:
            return self._ordered(answer, reference)
        if "\\pm" in answer.text + reference.text:
            return None
        return self._unordered(answer, reference)

    def _interval(self, answer: Answer, reference: Answer) -> Decision:
        if not self.policy.interval_may_be_inequality:
            return "undecided", "an interval against an inequality"
        answer, reference = _with_name(answer), _with_name(reference)
        if not has_inequality(reference.text):  # Math-Verify takes them only the other way round
            verdict, reason = self.compute(reference.text, answer.text)
            if verdict == "right":
                return verdict, reason
        return self.compute(answer.text, reference.text)

    def _ordered(self, answer: Answer, reference: Answer) -> Decision:
        found, required = (_items(side) for side in (answer, reference))
        if len(found) != len(required):
            return "wrong", f"{len(found)} items, required {len(required)}"
        return _all_of([self.compare(a, b) for a, b in zip(found, required, strict=True)])

    def _unordered(self, answer: Answer, reference: Answer) -> Decision:
        """Every item has its partner; naming one twice does no harm where the reference names none twice."""
        found, left = _items(answer), _items(reference)
        if len({_without_spaces(item) for item in left}) == len(left):
            found = list({_without_spaces(item): item for item in found}.values())
        if len(found) != len(left):
            return "wrong", f"{len(found)} items, required {len(left)}"
        if len(found) > MAX_UNORDERED:
            return "undecided", f"more than {MAX_UNORDERED} items"
        undecided = ""
        for item in found:
            decisions = [self.compare(item, other) for other in left]
            verdicts = [verdict for verdict, _ in decisions]
            if "right" in verdicts:
                del left[verdicts.index("right")]
            elif "undecided" in verdicts:
                undecided = decisions[verdicts.index("undecided")][1]
            else:
                return "wrong", f"the item {item.text} is not in the reference"[:120]
        return ("undecided", undecided) if undecided else ("right", "same items")


def _numbers(answer: Answer, reference: Answer) -> Decision:
    if answer.number == reference.number:
        return "right", "same number"
    places = len(answer.text.partition(".")[2]) if re.fullmatch(r"[+-]?\d*\.\d+", answer.text) else 0
    if places >= MIN_ROUNDED_PLACES and abs(answer.number - reference.number) <= Fraction(1, 2 * 10**places):
        return "right", "the number rounded"
    return "wrong", f"{answer.text} is not {reference.text}"[:120]


def _as_text(answer: str, reference: str) -> Decision | None:
    """References that are no formula: nothing, a choice letter, words, a pattern with an ellipsis."""
    if _EMPTY.fullmatch(reference):
        return _yes_no(_EMPTY.fullmatch(answer) is not None, "empty answer")
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


def _bases(answer: str, reference: str) -> Decision | None:
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


def _items(side: Answer) -> list[Answer]:
    return [normalize(item) for item in items(side.text, kind(side.text))]


def _without_spaces(item: Answer) -> str:
    return item.text.replace(" ", "") + item.unit


def _with_name(side: Answer) -> Answer:
    """The answer with its "x =" again."""
    return replace(side, text=side.equation or side.text)


def _is_numeric(members: list[str]) -> bool:
    """Whether no member has a variable, so that a = b states two values."""
    return not any(re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", member)) for member in members)


def _all_of(decisions: list[Decision]) -> Decision:
    """Wrong if any item is, else undecided if any is, else right."""
    for verdict in ("wrong", "undecided"):
        for decision in decisions:
            if decision[0] == verdict:
                return decision
    return "right", "same items"


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _yes_no(is_same: bool, how: str) -> Decision:
    return ("right", f"same {how}") if is_same else ("wrong", f"another {how}")
