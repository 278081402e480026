"""Rules for numbers with what stands around them: qualifiers, units, percent, rounding."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from r1engine.rewards.math.decision import Comparer, Decision, yes_no
from r1engine.rewards.math.normalize import Answer
from r1engine.rewards.math.numerals import AMBIGUOUS, indian, may_be_grouped
from r1engine.rewards.math.units import ratio

MIN_ROUNDED_PLACES = 5  # decimal places from which a rounded answer stands for the exact number


def qualifiers(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """ "5 or more" is not 5: at best undecided, unless both sides say the same words."""
    if answer.qualifier == reference.qualifier:
        return None
    verdict, reason = judge.compare(replace(answer, qualifier=""), replace(reference, qualifier=""))
    words = answer.qualifier or reference.qualifier
    if verdict == "wrong" and ((answer.qualifier and reference.qualifier) or not _computes(words)):
        return verdict, reason
    return "undecided", f"only one side says {words!r}"[:120]


def _computes(words: str) -> bool:
    """Whether the words may make another number of the one before them."""
    return (
        re.search(r"plus|minus|times|half|halved|double|triple|twice|divided|over|power|root|base|off|percent", words)
        is not None
    )


def measures(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """What differing units settle: one may be missing, those of one kind are converted."""
    if answer.unit == reference.unit:
        return None
    units = {answer.unit, reference.unit}
    plain = replace(answer, unit=""), replace(reference, unit="")
    if "%" in units:
        return _percent(judge, answer, reference, *plain)
    if units == {"degree", ""} and _is_angle((reference if answer.unit else answer).text):
        return judge.compute(*(_radians(side) for side in (answer, reference)))
    if units in ({"degree", "rad"}, {"degree", "radian"}):
        return judge.compute(*(_radians(side) for side in (answer, reference)))
    if units & AMBIGUOUS.keys():
        return _ambiguous(judge, answer, reference, *plain)
    if "" in units:
        return None
    factor = ratio(answer.unit, reference.unit)
    if factor is None:
        verdict, reason = judge.compare(*plain)
        different = f"units differ: {answer.unit} and {reference.unit}"[:120]
        return (verdict, reason) if verdict == "wrong" and answer.number is not None else ("undecided", different)
    if factor == 0:
        return "wrong", f"{answer.unit} measures something else than {reference.unit}"[:120]
    if factor == 1:
        return judge.compare(*plain)
    if answer.number is not None and reference.number is not None:
        return yes_no(answer.number * factor == reference.number, "measure")
    return judge.compute(f"({answer.text})\\cdot({factor})", reference.text)


def _is_angle(text: str) -> bool:
    return "\\pi" in text or re.search(r"\\arc(?:sin|cos|tan|cot)|\\(?:sin|cos|tan|cot)\s*\^\{-1\}", text) is not None


def _radians(side: Answer) -> str:
    return f"({side.text})\\cdot\\frac{{\\pi}}{{180}}" if side.unit == "degree" else side.text


def _ambiguous(judge: Comparer, answer: Answer, reference: Answer, plain: Answer, plain_reference: Answer) -> Decision:
    """Three pairs are 3 or 6."""
    verdict, reason = judge.compare(plain, plain_reference)
    if verdict != "wrong":
        return "undecided", f"{answer.unit or reference.unit} may count or multiply"
    sizes = [None if side.number is None else side.number * AMBIGUOUS.get(side.unit, 1) for side in (answer, reference)]
    if sizes[0] == sizes[1] is not None:
        return "undecided", f"{answer.unit or reference.unit} may count or multiply"
    return verdict, reason


def _percent(judge: Comparer, answer: Answer, reference: Answer, plain: Answer, plain_reference: Answer) -> Decision:
    if answer.value is not None and answer.value == reference.value:
        return "right", "same number, one as percent"
    verdict, reason = judge.compare(plain, plain_reference)
    if verdict == "right" and not judge.policy.percent_may_be_missing:
        what = "number" if answer.number is not None else "value"
        return "undecided", f"the same {what} with and without percent"
    return verdict, reason


def numbers(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """Exact numbers; a decimal of many places may be the reference rounded."""
    found, required = answer.number, reference.number
    if found is None and required is not None:
        return _grouped(answer.text, required)
    if required is None and found is not None:
        return _grouped(reference.text, found)
    if found is None or required is None:
        return None
    if found == required:
        return "right", "same number"
    places = len(answer.text.partition(".")[2]) if re.fullmatch(r"[+-]?\d*\.\d+", answer.text) else 0
    if places >= MIN_ROUNDED_PLACES and abs(found - required) <= Fraction(1, 2 * 10**places):
        return "right", "the number rounded"
    return "wrong", f"{answer.text} is not {reference.text}"[:120]


def _grouped(text: str, number: Fraction) -> Decision | None:
    """What can be a list of numbers or one number with its digits in groups."""
    if "," not in text:
        return None
    if indian(text) == number:
        return "right", "same number"
    return ("undecided", "a list, or one number in groups") if may_be_grouped(text, number) else None
