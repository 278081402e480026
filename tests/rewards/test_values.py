"""What exact and numeric values settle about two expressions, and what they leave to Math-Verify."""

from __future__ import annotations

import pytest
from sympy import Eq, Float, I, Integral, Matrix, cos, exp, log, oo, pi, sin, sqrt, symbols, sympify

from r1engine.rewards.math.values import decide_by_values

x, y, i = symbols("x y i")


@pytest.mark.parametrize(
    ("expected", "found", "decision"),
    [
        (sqrt(12), 2 * sqrt(3), ("right", "the same number")),
        (exp(I * pi), sympify(-1), ("right", "the same number")),
        (pi, sympify("22/7"), ("wrong", "another number")),
        (log(Float("0.01"), 10, evaluate=False), sympify(-2), ("right", "the same number")),
        (log(Float("0.02"), 10, evaluate=False), sympify(-2), ("wrong", "another number")),
        (sympify("10**-30"), sympify("2*10**-30"), ("wrong", "another number")),
        ((x + y) ** 20, (y + x) ** 19 * (x + y), ("right", "the same function")),
        ((x**2 - 1) / (x - 1), x + 1, ("right", "the same function")),
        ((x + 1) ** 2, x**2 + 1, ("wrong", "another function")),
        (x, y, ("wrong", "another function")),
        (sin(x), cos(x), ("wrong", "another function")),
        (Eq(2 * x + 4 * y, 3), Eq(4 * x + 8 * y, 6), ("right", "the same equation")),
        (Eq(y, 1 / x), Eq(-3 * y, -3 / x), ("right", "the same equation")),
        (Eq(y, 2 * x + 1), Eq(y, 2 * x + 2), ("wrong", "another equation")),
        # Values do not settle these.
        (sin(x) ** 2 + cos(x) ** 2, sympify(1), None),
        (sqrt(x**2), x, None),
        (pi, sympify("3.1415927"), None),  # rounded: the rule of decimals is not ours
        (sin(1) ** 2 + cos(1) ** 2 - 1, sympify("0*x"), None),  # no digit of it is sure
        (Eq(x * y, 1), Eq(y, 1 / x), None),  # not proportional, yet the same for x != 0
        (Eq(x, x), Eq(y, y), None),
        (oo, sympify(1), None),
        (Integral(x, x), x**2 / 2, None),
        (Matrix([[x]]), Matrix([[x]]), None),
    ],
)
def test_decision(expected, found, decision):
    assert decide_by_values(expected, found, seed="a") == decision


def test_points_depend_on_the_texts_so_that_no_answer_can_be_right_just_there():
    # The answer is right at the points of another seed only.
    import random

    points = random.Random("a")
    places = [points.randint(10**11, 10**12) for _ in range(2)]
    answer = x**2 + (x - places[0]) * (x - places[1])
    assert decide_by_values(x**2, answer, seed="a") == ("right", "the same function")
    assert decide_by_values(x**2, answer, seed="b") == ("wrong", "another function")
