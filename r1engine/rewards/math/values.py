"""Settles by exact and numeric values what Math-Verify would simplify for tens of milliseconds.

Polynomials and rational functions are compared exactly, at random points (Schwartz-Zippel); constants to 30 digits; any
other functions are only found to differ. What stays open is left to Math-Verify. SymPy is imported when it runs.
"""

from __future__ import annotations

import random
from typing import Any, Literal

_POINTS = 2  # a nonzero numerator of degree 100 vanishes at both with probability 10^-20
_RANGE = (10**11, 10**12)
_DIGITS = 30
_SAME, _DIFFERENT = 1e-25, 1e-6  # relative differences; between them Math-Verify decides

Decision = tuple[Literal["right", "wrong"], str]


def decide_by_values(expected: Any, found: Any, *, seed: str) -> Decision | None:
    """(verdict, reason) of two SymPy objects, or None if their values do not settle it.

    Args:
        expected, found: what was parsed of the reference and of the answer.
        seed: of the points. It should depend on both texts: nobody can then write an answer that is right just there.
    """
    from sympy import Eq, Expr

    points = random.Random(seed)
    if isinstance(expected, Eq) and isinstance(found, Eq):
        return _equations(expected.lhs - expected.rhs, found.lhs - found.rhs, points)
    if not (isinstance(expected, Expr) and isinstance(found, Expr)) or _is_unevaluated(expected, found):
        return None
    if not (expected.free_symbols or found.free_symbols):
        return _constants(expected, found)
    if _is_exact(expected) and _is_exact(found):
        return _functions(expected - found, points)
    return _differ(expected, found, points)


def _functions(difference: Any, points: random.Random) -> Decision | None:
    for _ in range(_POINTS):
        value = _at(difference, points)
        if not value.is_Rational:  # a pole
            return None
        if value != 0:
            return "wrong", "another function"
    return "right", "the same function"


def _equations(expected: Any, found: Any, points: random.Random) -> Decision | None:
    """Right if one is a multiple of the other; those that are not have other solutions for sure only if linear."""
    if not (_is_exact(expected) and _is_exact(found)) or expected.free_symbols != found.free_symbols:
        return None
    ratios = set()
    for _ in range(_POINTS):
        place = points.getstate()
        left = _at(expected, points)
        points.setstate(place)  # the same values for the same symbols
        right = _at(found, points)
        if not (left.is_Rational and right.is_Rational and left * right != 0):
            return None
        ratios.add(left / right)
    if len(ratios) == 1:
        return "right", "the same equation"
    return ("wrong", "another equation") if _is_linear(expected) and _is_linear(found) else None


def _constants(expected: Any, found: Any) -> Decision | None:
    if expected.is_Rational and found.is_Rational:
        return ("right", "the same number") if expected == found else ("wrong", "another number")
    left, right = (_number(_without_floats(side)) for side in (expected, found))
    if left is None or right is None:
        return None
    distance = _distance(left, right)
    if distance > _DIFFERENT:
        return "wrong", "another number"
    return ("right", "the same number") if distance <= _SAME else None


def _differ(expected: Any, found: Any, points: random.Random) -> Decision | None:
    """Wrong if the values at a point differ; functions with roots or sines that agree there need not be equal."""
    from sympy import Rational

    symbols = sorted(expected.free_symbols | found.free_symbols, key=str)
    place = {symbol: Rational(points.randint(100, 900), 997) for symbol in symbols}
    left, right = (_number(side.subs(place)) for side in (expected, found))
    if left is None or right is None or _distance(left, right) <= _DIFFERENT:
        return None
    return "wrong", "another function"


def _at(expression: Any, points: random.Random) -> Any:
    """Exact value at a point."""
    return expression.subs({s: points.randint(*_RANGE) for s in sorted(expression.free_symbols, key=str)})


def _without_floats(expression: Any) -> Any:
    """Decimals as the fractions that they are: the logarithm of 0.01 to the base 10 is exactly -2."""
    from sympy import Float, Rational

    return expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})


def _number(expression: Any) -> Any | None:
    """Its value to 30 digits; None if it has none or loses its digits by cancellation."""
    from sympy import Float

    value = expression.evalf(_DIGITS)
    is_sure = all(part._prec > 1 for part in value.atoms(Float))
    return value if is_sure and value.is_number and value.is_finite and value.as_real_imag()[0].is_Number else None


def _distance(left: Any, right: Any) -> float:
    """Of two numbers, relative to the larger one."""
    larger = max(abs(left), abs(right))
    return float(abs(left - right) / larger) if larger else 0.0


def _is_exact(expression: Any) -> bool:
    """Whether it is a rational function of its symbols with rational coefficients."""
    from sympy import Float

    return bool(expression.is_rational_function()) and not expression.has(Float) and _has_rational_numbers(expression)


def _is_linear(expression: Any) -> bool:
    from sympy import Poly

    symbols = expression.free_symbols
    return bool(expression.is_polynomial(*symbols)) and Poly(expression, *symbols).total_degree() <= 1


def _has_rational_numbers(expression: Any) -> bool:
    return all(number.is_Rational for number in expression.atoms() if number.is_number)


def _is_unevaluated(*expressions: Any) -> bool:
    """Whether there is a sum, integral or limit, whose value may take any time."""
    from sympy import Derivative, Integral, Limit, Product, Sum

    return any(expression.has(Derivative, Integral, Limit, Product, Sum) for expression in expressions)
