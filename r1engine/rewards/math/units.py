"""Units of measure behind a number: taken off, and compared."""

from __future__ import annotations

import re
from fractions import Fraction

_F = Fraction
# name -> (dimension, size in the dimension's base unit). What is not here is a word such as "apples".
_SIZES: dict[str, tuple[str, Fraction]] = {
    **{name: ("length", size) for names, size in (
        ("mm millimeter millimetre", _F(1, 1000)), ("cm centimeter centimetre", _F(1, 100)), ("m meter metre", _F(1)),
        ("km kilometer kilometre", _F(1000)), ("in inch inche", _F(254, 10000)), ("ft foot feet", _F(3048, 10000)),
        ("yd yard", _F(9144, 10000)), ("mi mile", _F(1609344, 1000)),
    ) for name in names.split()},
    **{name: ("mass", size) for names, size in (
        ("mg milligram", _F(1, 1000)), ("g gram", _F(1)), ("kg kilogram", _F(1000)),
        ("oz ounce", _F(28349523125, 10**9)), ("lb pound", _F(45359237, 10**5)),
    ) for name in names.split()},
    **{name: ("time", size) for names, size in (
        ("s sec second", _F(1)), ("min minute", _F(60)), ("h hr hour", _F(3600)), ("day", _F(86400)),
        ("week", _F(604800)),
    ) for name in names.split()},
    **{name: ("volume", size) for names, size in (
        ("ml milliliter millilitre", _F(1, 1000)), ("l liter litre", _F(1)),
    ) for name in names.split()},
    **{name: ("money", size) for names, size in (("cent", _F(1, 100)), ("dollar", _F(1))) for name in names.split()},
    "degree": ("angle", _F(1)),
}  # fmt: skip
_SHORT = "|".join(sorted((name for name in _SIZES if len(name) > 1), key=len, reverse=True))
_WORDS = f"(?:{_SHORT})s?|inches|month|months|year|years|units?|mph|km/h|m/s|people|students|ways|points|yuan"
_PERCENT = "percent(?:age)?|pct"
_WITH_UNIT = re.compile(
    r"(?P<number>.*[\d})])\s*"
    r"(?:\\(?:text(?:bf|rm|normal)?|mbox|mathrm)\s*\{(?P<word>[^{}]*)\}"
    rf"|(?<![a-zA-Z])(?P<known>(?:square |cubic )?(?:{_WORDS}|{_PERCENT}|(?<=\s)[mgsh](?=[\s^.]|$))))"
    r"\.?\s*(?P<power>\^\{?[23]\}?)?"
)
_SIGNS = (
    ("\\%", "%"), ("%", "%"), ("^\\circ", "degree"), ("^{\\circ}", "degree"), ("\u00b0", "degree"),
    ("\\$", "dollar"), ("$", "dollar"), ("\u20ac", "euro"), ("m\u00b2", "m^2"),
)  # fmt: skip
_BEFORE = (("\\$", "dollar"), ("$", "dollar"), ("\u20ac", "euro"), ("\u00a3", "pound sterling"))


def take_unit(text: str) -> tuple[str, str]:
    """(text without its unit, unit); the unit is "" if there is none, "%" for percent, else a word in the singular."""
    for sign, unit in _SIGNS:
        if text.endswith(sign):
            return text[: -len(sign)].strip(), unit
    for sign, unit in _BEFORE:
        if text.startswith(sign):
            return text[len(sign) :].strip(), unit
    # A unit ends in a letter, a brace, a stop or its power.
    match = None if text[-1:].isdigit() and "^" not in text else _WITH_UNIT.fullmatch(text)
    if match is None:
        return text, ""
    unit = " ".join((match["word"] or match["known"] or "").lower().rstrip(".").split())
    if re.fullmatch(_PERCENT, unit):
        return match["number"].strip(), "%"
    power = re.sub(r"[{}]", "", match["power"] or "")
    for word, sign in (("square ", "^2"), ("cubic ", "^3")):
        if unit.startswith(word):
            unit, power = unit[len(word) :], sign
    return match["number"].strip(), _singular(unit) + power


def ratio(unit: str, other: str) -> Fraction | None:
    """How many of `other` one `unit` is; 0 if they measure different things; None if that is unknown."""
    (name, _, power), (other_name, _, other_power) = unit.partition("^"), other.partition("^")
    if name not in _SIZES or other_name not in _SIZES:
        return None
    (dimension, size), (other_dimension, other_size) = _SIZES[name], _SIZES[other_name]
    if (dimension, power) != (other_dimension, other_power):
        return Fraction(0)
    return (size / other_size) ** int(power or 1)


def _singular(unit: str) -> str:
    if unit == "inches":
        return "inch"
    if unit in _SIZES or not unit.endswith("s"):
        return unit
    return unit[:-1]
