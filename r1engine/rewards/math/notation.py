"""Notations of one value that Math-Verify does not read: one function each, from LaTeX to LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable

_COMBINATIONS = re.compile(
    r"(?<![A-Za-z\\])(?:\{\s*\})?(?:[_^]\{(?P<n0>\d+)\}|(?P<n5>\d+)(?=[CP]\d))?\s*(?P<letter>[CPA])"
    r"(?:\((?P<n1>\d+)\s*,\s*(?P<k1>\d+)\)|_\{(?P<a2>\d+)\}\s*\^\{(?P<b2>\d+)\}|\^\{(?P<b3>\d+)\}\s*_\{(?P<a3>\d+)\}"
    r"|_\{(?P<k4>\d+)\}(?!\s*\^)|(?P<k5>\d+))"
)
_BINOMIAL = re.compile(r"(\\binom\{[^{}]*\}\{[^{}]*\})\s*(?=[\dA-Za-z(]|\\(?:binom|frac|sqrt|pi))")
_BINOMIAL_BEFORE = re.compile(r"([\d)}!]|(?<![A-Za-z\\])[A-Za-z])\s*(?=\\binom)")
_UNIT_VECTOR = re.compile(
    r"\s*([+-]?)\s*([^+\-,=()]{0,60}?|\([^()]*\))\s*\\(?:vec|hat)\{\s*\\?([ijk])(?:math)?\s*\}\s*"
)
_MATRIX_ARRAY = re.compile(r"([(\[])\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*([)\]])", re.DOTALL)
_SYSTEM = re.compile(
    r"(?:\\\{\s*)?\\begin\{(cases|array|aligned|align\*?|gathered|equation\*?|split|gather\*?)\}(?:\s*\{[lcr|\s]+\})?(.*?)\\end\{\1\}",
    re.DOTALL,
)
_ALIGNED = re.compile(
    r"&\s*(?:=|<|>|\\(?:le|ge|neq|approx)(?![a-z]))\s*&?|(?:=|<|>|\\(?:le|ge|neq|approx)(?![a-z]))\s*&"
)


def combinations(text: str) -> str:
    """\\binom{5}{2} for C(5,2), C_5^2, C^2_5, {}_5C_2 and 5C2; the same of permutations P(5,2), A_5^2."""
    return _COMBINATIONS.sub(_combination, text) if re.search(r"[CPA]\s*[(_^\d]", text) else text


def _combination(match: re.Match[str]) -> str:
    named = {name: int(digits) for name, digits in match.groupdict().items() if digits and name != "letter"}
    letter = match["letter"]
    if "n1" in named and letter != "A":
        n, k = named["n1"], named["k1"]
    elif "a2" in named or "a3" in named:
        # The larger one stands for the whole, whether written below (as in China) or above.
        n, k = sorted(named.values(), reverse=True)[:2]
    elif "n0" in named and "k4" in named:
        n, k = named["n0"], named["k4"]
    elif "n5" in named and "k5" in named:
        n, k = named["n5"], named["k5"]
    else:
        return match[0]
    if k > n or n > 1000:
        return match[0]
    return f"\\binom{{{n}}}{{{k}}}" if letter == "C" else f"\\frac{{{n}!}}{{({n}-{k})!}}"


def binomial_factors(text: str) -> str:
    """\\binom{5}{2} \\cdot 3 for \\binom{5}{2} 3, which Math-Verify reads as a sum."""
    if "\\binom" not in text:
        return text
    return _BINOMIAL_BEFORE.sub(r"\1\\cdot ", _BINOMIAL.sub(r"\1\\cdot ", text))


def unit_vectors(text: str) -> str:
    """(1,2) for \\vec{i} + 2\\vec{j}: a sum of multiples of at least two unit vectors."""
    if "\\vec{" not in text and "\\hat{" not in text:
        return text
    terms = list(_UNIT_VECTOR.finditer(text))
    names = [term[3] for term in terms]
    if len(names) < 2 or len(set(names)) != len(names) or "".join(term[0] for term in terms) != text:
        return text
    found = {term[3]: f"{'-' if term[1] == '-' else ''}{term[2].strip() or '1'}" for term in terms}
    return "(" + ", ".join(found.get(name, "0") for name in ("ijk" if "k" in found else "ij")) + ")"


def environments(text: str) -> str:
    """The rows of a system or of aligned lines as a list; an array in brackets as a matrix."""
    if "\\begin" not in text:
        return text
    return _SYSTEM.sub(_rows, _MATRIX_ARRAY.sub(_matrix, text)).strip()


def _matrix(match: re.Match[str]) -> str:
    name = "pmatrix" if match[1] == "(" else "bmatrix"
    return f"\\begin{{{name}}}{match[2]}\\end{{{name}}}"


def _rows(match: re.Match[str]) -> str:
    rows = [row.strip() for row in match[2].split("\\\\") if row.strip()]
    is_table = any("&" in _ALIGNED.sub("", row) for row in rows)
    if is_table and match[1] in ("cases", "array"):  # values by condition, or a matrix: no list
        return match[0]
    return ", ".join(row.replace("&", "").strip().rstrip(",;") for row in rows)


# In this order, on tidy LaTeX.
NOTATIONS: tuple[Callable[[str], str], ...] = (environments, combinations, binomial_factors, unit_vectors)
