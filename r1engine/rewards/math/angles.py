"""Degrees: with minutes and seconds, inside functions, and as a sign that may be left out."""

from __future__ import annotations

import re
from fractions import Fraction

_SEXAGESIMAL = re.compile(
    r"([+-]?)(\d+)\s*\^\{\\circ\}\s*(?:(\d+(?:\.\d+)?)\s*(?:'|\^\{\\prime\}|\\prime))?"
    r"\s*(?:(\d+(?:\.\d+)?)\s*(?:''|\"|\^\{\\prime\s*\\prime\}))?"
)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|(?<![A-Za-z\\])[a-z]|\\(?:alpha|beta|theta)|\([^()]*\))\s*\^\{\\circ\}"
)


def in_minutes(text: str) -> Fraction | None:
    """Degrees of 30^{\\circ} 15' 36''; None if there are no minutes or seconds."""
    match = _SEXAGESIMAL.fullmatch(text) if "\\circ" in text else None
    if match is None or not (match[3] or match[4]):
        return None
    value = int(match[2]) + Fraction(match[3] or 0) / 60 + Fraction(match[4] or 0) / 3600
    return -value if match[1] == "-" else value


def has_function(text: str) -> bool:
    """Whether a trigonometric function is in it, so that a degree sign is no unit of the whole."""
    return _FUNCTION.search(text) is not None


def in_radians(text: str) -> str:
    """Every n^{\\circ} as n \\cdot \\pi / 180: degrees inside functions, which take radians."""
    if "\\circ" not in text or not has_function(text):
        return text
    return _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)


def without_degrees(text: str) -> str:
    """45 + 30 for 45^{\\circ} + 30, of which the last sign is gone already."""
    return re.sub(r"\s*\^\{\\circ\}", "", text)
