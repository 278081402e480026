"""What runs in the worker processes: the part of scoring that computes, and so may take any time or memory."""

from __future__ import annotations

from typing import Any

from r1engine.rewards.language import language_of, language_share
from r1engine.rewards.math.accuracy import MathPolicy, judge, reference_problem


def work(item: dict[str, Any]) -> dict[str, Any]:
    """Results of the tasks in `item`, under the same names.

    math:     [answer, reference, policy] -> [verdict, reason]
    language: [thoughts, target language, detector] -> [target, share or null, number of words, {language: words}]
              a target "" is the language of the text in "question"
    reference: a reference -> why it cannot be used, or ""
    """
    results: dict[str, Any] = {}
    if "math" in item:
        answer, reference, policy = item["math"]
        results["math"] = judge(answer, reference, MathPolicy(**policy))
    if "reference" in item:
        results["reference"] = reference_problem(item["reference"])
    if "language" in item:
        text, target, detector = item["language"]
        target = target or language_of(item["question"], detector=detector)
        results["language"] = [target, *(language_share(text, target, detector=detector) if target else (None, 0, {}))]
    return results


def warm_up() -> None:
    """Loads what is slow to load, and lets ANTLR build its tables, before workers are forked."""
    for answer, reference in (  # by values, by numbers, by simplifying, as equations and as inequalities
        ("\\frac{x+1}{2}", "\\frac{1+x}{2}"),
        ("\\sqrt{2}+\\pi", "e^{2}"),
        ("\\sin^2(x)+\\cos^2(x)", "1"),
        ("y=2x+1", "2x-y+1=0"),
        ("x<3", "3>x"),
    ):
        judge(answer, reference)
    language_of("what language is this sentence written in")
