"""Why an expression may take too long to compute: bounds that are checked on its text before SymPy sees it."""

from __future__ import annotations

import re
from math import prod

from r1engine.rewards.extract import matching_brace

MAX_CHARACTERS = 500  # of one expression
MAX_DIGITS = 400  # of one literal
MAX_DEPTH = 50  # brackets inside brackets
MAX_NUMERIC_EXPONENT = 4000  # 2^4000: SymPy works it out exactly
MAX_SYMBOLIC_EXPONENT = 60  # x^800 keeps `simplify` busy for seconds
MAX_FACTORIAL = 1000

_EXPENSIVE = re.compile(r"\bfactorial|\\binom\{?(?:\d{4,}|[^{}]*[\^!])|\\(?:sum|prod)(?![a-z]).{0,80}?\d{4}")
_VARIABLE = re.compile(
    r"(?<![\\a-zA-Z])(?![ei](?![a-zA-Z]))[a-zA-Z](?![a-zA-Z])|\\(?:alpha|beta|theta|lambda|mu)(?![a-z])"
)
_PLAIN_POWER = re.compile(r"(\d+)\s*\^\s*\{?\s*(\d+)\s*\}?")
_POWER = re.compile(r"\^\s*")


def size_problem(text: str) -> str:
    """Why an expression may take too long to compute, or ""."""
    if len(text) > MAX_CHARACTERS:
        return f"is an expression of more than {MAX_CHARACTERS} characters"
    if max(map(len, re.findall(r"\d+", text)), default=0) > MAX_DIGITS:
        return f"has a number of more than {MAX_DIGITS} digits"
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return f"has more than {MAX_DEPTH} brackets inside each other"
    if _EXPENSIVE.search(text):
        return "has a sum, product or binomial of large numbers"
    if re.search(r"!\s*[)}\]]*\s*!", text) or any(int(n) > MAX_FACTORIAL for n in re.findall(r"(\d+)\s*!", text)):
        return f"has a factorial of more than {MAX_FACTORIAL} or of a factorial"
    limit = MAX_SYMBOLIC_EXPONENT if _VARIABLE.search(text) else MAX_NUMERIC_EXPONENT
    return next((problem for exponent in _exponents(text) if (problem := _exponent_problem(exponent, limit))), "")


def _exponents(text: str) -> list[str]:
    """Every exponent, those inside others as well; "^" for one that another follows, as in 9^9^9."""
    found = []
    for power in _POWER.finditer(text):
        end = matching_brace(text, power.end())
        if end is None:
            single = re.compile(r"\\?[A-Za-z]+|[+-]?\d+|\([^()]*\)").match(text, power.end())
            exponent, end = (single[0], single.end() - 1) if single else ("", power.end())
        else:
            exponent = text[power.end() + 1 : end]
        found.append("^" if text[end + 1 :].lstrip().startswith("^") else exponent)
    return found


def _exponent_problem(exponent: str, limit: int) -> str:
    """Why one exponent may be too large, or "". The towers e^{x^2} and 2^{2^3} are small."""
    if "!" in exponent:
        return "has a factorial in an exponent"
    plain = _PLAIN_POWER.sub(lambda match: _power(int(match[1]), int(match[2]), limit), exponent)
    if exponent == "^" or any("^" in inner for inner in _exponents(plain)) or "too large" in plain:
        return "has a power in an exponent"
    numbers = [int(number) for number in re.findall(r"\d+", plain)]
    if _VARIABLE.search(plain):
        limit = MAX_NUMERIC_EXPONENT  # e^{-100 t} is never multiplied out
    elif "frac" not in plain:
        numbers.append(prod(numbers))
    return f"has an exponent above {limit}" if max(numbers, default=0) > limit else ""


def _power(base: int, exponent: int, limit: int) -> str:
    if exponent > limit or base > limit or base**exponent > limit:
        return "too large"
    return str(base**exponent)
