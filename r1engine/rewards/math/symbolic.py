"""Asks Math-Verify, the part of the accuracy rule that computes; imported lazily, as it brings SymPy.

Its own timeouts use SIGALRM, which fails off the main thread, so they are off. What could run away is
refused by size instead. A bound on size is none on time: code that must never stall runs this in a process
that can be killed.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

from r1engine.rewards.math.families import same_family
from r1engine.rewards.math.size import size_problem
from r1engine.rewards.math.structure import split_at
from r1engine.rewards.math.values import decide_by_values


def compare_symbolically(answer: str, reference: str) -> tuple[Literal["right", "wrong", "undecided"], str]:
    """(verdict, reason in one line) by Math-Verify, for normalized answers.

    An answer that it cannot read is wrong; a reference that it cannot read, and anything too large or that
    raises, is undecided.
    """
    for name, text in (("reference", reference), ("answer", answer)):
        if problem := size_problem(text):
            return "undecided", f"the {name} {problem}"
    expected = _parse(reference)
    if expected is None:
        return "undecided", "the reference cannot be read"
    found = _parse(answer)
    if found is None:
        return "wrong", "the answer cannot be read"
    from math_verify import verify

    try:
        expected, found = _with_constants(expected), _with_constants(found)
        if (decided := same_family(expected, found)) is not None:
            return decided
        if (decided := decide_by_values(expected, found, seed=f"{reference} {answer}")) is not None:
            return decided
        is_equal = verify(expected, found, timeout_seconds=None, raise_on_error=True)
        if is_equal and not _is_close(expected, found):
            return "wrong", "another number"
    except Exception as error:  # whatever SymPy raises: the comparison was not computed
        return "undecided", f"the comparison raised {type(error).__name__}: {error}"[:120].splitlines()[0]
    return ("right", "equal by Math-Verify") if is_equal else ("wrong", "not equal by Math-Verify")


def reading_problem(text: str) -> str:
    """Why a reference cannot be compared with anything, or ""."""
    return size_problem(text) or ("" if _parse(text) is not None else "cannot be read")


@cache
def _extraction() -> Any:
    """How Math-Verify is to read: the box and nothing else."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig

    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)  # it warns that the timeouts are off
    cleaning = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="all", equations=False
    )
    return LatexExtractionConfig(boxed_match_priority=0, normalization_config=cleaning)


def _parse(text: str) -> Any | None:
    """The SymPy object; None for what cannot be read."""
    from math_verify import parse

    try:
        results = parse(
            f"\\boxed{{{text}}}",
            extraction_config=[_extraction()],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
            raise_on_error=True,
        )
    except Exception:  # whatever the grammar raises; the caller gets None and says whose text it was
        return None
    expressions = [result for result in results if not isinstance(result, str)]
    if len(expressions) != 1 or (len(split_at(text, "=")) > 1 and not _has_relation(expressions[0])):
        return None  # an equation read as something else compares equal to any other such equation
    return expressions[0]


def _has_relation(expression: Any) -> bool:
    from sympy.core.relational import Relational

    return isinstance(expression, Relational)


def _with_constants(expression: Any) -> Any:
    """The imaginary unit for `i` where it is the only variable: e^{i\\pi} is a number."""
    from sympy import Expr, I, Symbol

    if isinstance(expression, Expr) and {symbol.name for symbol in expression.free_symbols} == {"i"}:
        return expression.subs({symbol: I for symbol in expression.free_symbols if isinstance(symbol, Symbol)})
    return expression


def _is_close(expected: Any, found: Any) -> bool:
    """False for two numbers that differ by more than 1e-6 of their size; Math-Verify rounds to 6 places."""
    from sympy import Expr, N, Rational

    if not (isinstance(expected, Expr) and isinstance(found, Expr)):
        return True
    if expected.free_symbols or found.free_symbols or not (expected.is_finite and found.is_finite):
        return True
    left, right = expected.doit(), found.doit()
    if isinstance(left, Rational) and isinstance(right, Rational):
        return left == right
    left, right = N(left, 30), N(right, 30)
    return bool(abs(left - right) <= 1e-6 * max(abs(left), abs(right)))
