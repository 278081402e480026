"""The accuracy rule: compares an answer with the reference, exactly where that is possible.

An answer is first brought to a plain form (`normalize`), by one module a kind of writing: characters, markdown, tex,
numerals, phrases, notation, words. Then COMPARISONS decide, one function a kind of answer. What they do not settle
Math-Verify is asked, and its known false positives (units, percent, number bases, tuple against set, tiny numbers,
false chains of equations) are kept from it or checked again.

A new way of writing an answer is a row of the table in the module of its kind; a new kind of answer a function in
COMPARISONS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn

from r1engine.rewards.extract import MAX_ANSWER_CHARACTERS
from r1engine.rewards.math.decision import MAX_DEPTH, STRICT, Comparer, Comparison, Compute, Decision, MathPolicy
from r1engine.rewards.math.families import families
from r1engine.rewards.math.lists import chains, collections, named_values, with_name, words_in_order
from r1engine.rewards.math.normalize import Answer, normalize
from r1engine.rewards.math.quantities import measures, numbers, qualifiers
from r1engine.rewards.math.sets import is_set, sets
from r1engine.rewards.math.structure import chain, has_relation, items, kind
from r1engine.rewards.math.symbolic import compare_symbolically, reading_problem
from r1engine.rewards.math.texts import ELLIPSIS, bases, is_text, ratios, same_text, words

_INTEGER = re.compile(r"[+-]?[0-9]{1,50}")


def conditions(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """A condition is no value; y = 2x against y - 2x = 0: only one of them lost its "y ="."""
    if has_relation(answer.text) == has_relation(reference.text):
        return None
    answer, reference = with_name(answer), with_name(reference)
    if has_relation(answer.text) != has_relation(reference.text):
        return "wrong", "a condition against a value"
    return judge.compute(answer.text, reference.text)


# The first that does not return None decides.
COMPARISONS: tuple[Comparison, ...] = (
    qualifiers,
    measures,
    named_values,
    same_text,
    numbers,
    words_in_order,
    words,
    bases,
    ratios,
    families,
    sets,
    chains,
    collections,
    conditions,
)


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
    """(verdict, reason in one line) of an answer, by COMPARISONS and then by `compute`.

    - A decimal with MIN_ROUNDED_PLACES places is right if it is the reference rounded to those places.
    - A unit may be missing on one side. Units of one kind are converted, unknown ones are undecided.
    - 10% is 0.1. Whether 10% is 10, and whether an interval may be written as an inequality, is a matter of `policy`.
    - A set is not a tuple. Every member of a chain a = b = c must equal the reference.
    - Named values agree by name. A list of truth values has an order, a list of other values has none.
    - "5 or more" is not 5, 5 million is 5,000,000.
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
    return Comparer(policy, compute, COMPARISONS).compare(found, required)


def reference_problem_at_once(reference: str) -> str | None:
    """`reference_problem` as far as text goes; None where Math-Verify is to be asked."""

    def refuse(expression: str) -> NoReturn:
        raise _NeedsComputing

    try:
        return reference_problem(reference, readable=refuse)
    except _NeedsComputing:
        return None


def reference_problem(reference: str, *, readable: Callable[[str], str] = reading_problem, depth: int = 0) -> str:
    """Why every answer to this reference would be undecided, or "" if it can be used.

    `readable` says the same of a plain expression. `depth` counts the lists that it stands in.
    """
    if depth > MAX_DEPTH:
        return f"has more than {MAX_DEPTH} parts inside each other"
    if len(reference) > MAX_ANSWER_CHARACTERS:
        return f"is longer than {MAX_ANSWER_CHARACTERS} characters"
    plain = normalize(reference)
    if not plain.text:
        return "is blank"
    if ELLIPSIS.search(plain.text):
        return "is a pattern with an ellipsis"
    if plain.number is not None or is_text(plain.text) or is_set(plain):
        return ""
    if kind(plain.text) not in ("other", "relation"):
        parts = items(plain.text, kind(plain.text))
        problems = (reference_problem(part, readable=readable, depth=depth + 1) for part in parts)
        return next((problem for problem in problems if problem), "")
    last = normalize(chain(plain.text)[-1])
    return "" if last.number is not None else readable(plain.text)
