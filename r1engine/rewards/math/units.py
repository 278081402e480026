"""Units of measure: a table of names, and what a compound such as km/h or kg m s^{-2} measures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from r1engine.rewards.math import chinese

_F = Fraction
Dimensions = tuple[tuple[str, int], ...]  # (base quantity, power), sorted


@dataclass(frozen=True)
class Measure:
    """What one unit is: a size in base units (metre, gram, second, degree, dollar) of some dimensions."""

    size: Fraction
    dimensions: Dimensions
    is_known: bool = True  # False: a word such as apple is in it


# (names, size, dimensions). A plural in s or es is understood.
_ROWS: tuple[tuple[str, Fraction, str], ...] = (
    ("nm nanometer nanometre", _F(1, 10**9), "length"),
    ("\\mum micrometer micrometre micron", _F(1, 10**6), "length"),
    ("mm millimeter millimetre", _F(1, 1000), "length"),
    ("cm centimeter centimetre", _F(1, 100), "length"),
    ("dm decimeter decimetre", _F(1, 10), "length"),
    ("m meter metre", _F(1), "length"),
    ("km kilometer kilometre", _F(1000), "length"),
    ("li", _F(500), "length"),
    ("in inch inche", _F(254, 10000), "length"),
    ("ft foot feet", _F(3048, 10000), "length"),
    ("yd yard", _F(9144, 10000), "length"),
    ("mi mile", _F(1609344, 1000), "length"),
    ("mg milligram", _F(1, 1000), "mass"),
    ("g gram gm", _F(1), "mass"),
    ("kg kilogram kilo", _F(1000), "mass"),
    ("jin", _F(500), "mass"),
    ("t ton tonne", _F(10**6), "mass"),
    ("oz ounce", _F(28349523125, 10**9), "mass"),
    ("lb pound", _F(45359237, 10**5), "mass"),
    ("ms millisecond", _F(1, 1000), "time"),
    ("s sec second", _F(1), "time"),
    ("min minute", _F(60), "time"),
    ("h hr hour", _F(3600), "time"),
    ("day", _F(86400), "time"),
    ("week", _F(604800), "time"),
    ("month", _F(1), "months"),
    ("year yr", _F(12), "months"),
    ("ml milliliter millilitre cc", _F(1, 10**6), "length^3"),
    ("l liter litre", _F(1, 1000), "length^3"),
    ("gal gallon", _F(3785411784, 10**12), "length^3"),
    ("qt quart", _F(3785411784, 4 * 10**12), "length^3"),
    ("hectare ha", _F(10**4), "length^2"),
    ("acre", _F(40468564224, 10**7), "length^2"),
    ("cent \u00a2", _F(1, 100), "dollar"),
    ("dollar $ usd us$ buck", _F(1), "dollar"),
    ("yuan rmb cny \u00a5", _F(1), "yuan"),
    ("jiao", _F(1, 10), "yuan"),
    ("euro eur \u20ac", _F(1), "euro"),
    ("\u00a3 gbp", _F(1), "sterling"),
    ("\u20b9 rupee rs inr", _F(1), "rupee"),
    ("degree deg", _F(1), "angle"),
    ("arcminute", _F(1, 60), "angle"),
    ("arcsecond", _F(1, 3600), "angle"),
    ("rad radian", _F(1), "radian"),
    ("celsius", _F(1), "celsius"),
    ("fahrenheit", _F(1), "fahrenheit"),
    ("K kelvin", _F(1), "kelvin"),
    ("mph", _F(1609344, 3600 * 1000), "length time^-1"),
    ("kph kmh kmph", _F(1000, 3600), "length time^-1"),
    ("knot", _F(1852, 3600), "length time^-1"),
    ("Hz hertz", _F(1), "time^-1"),
    ("rpm", _F(1, 60), "time^-1"),
    ("N newton", _F(1000), "mass length time^-2"),
    ("J joule", _F(1000), "mass length^2 time^-2"),
    ("kJ kilojoule", _F(10**6), "mass length^2 time^-2"),
    ("W watt", _F(1000), "mass length^2 time^-3"),
    ("kW kilowatt", _F(10**6), "mass length^2 time^-3"),
    ("Pa pascal", _F(1000), "mass length^-1 time^-2"),
    ("A amp ampere", _F(1), "current"),
    ("C coulomb", _F(1), "current time"),
    ("V volt", _F(1000), "mass length^2 time^-3 current^-1"),
    ("mol mole", _F(1), "amount"),
)  # fmt: skip
_WHOLE = {  # phrases that are one unit though they have several words
    "degree celsius": "celsius", "degree c": "celsius", "degree fahrenheit": "fahrenheit", "degree f": "fahrenheit",
    "angular degree": "degree", "u.s. dollar": "dollar", "us dollar": "dollar", "american dollar": "dollar",
    "square unit": "unit^2", "sq unit": "unit^2", "cubic unit": "unit^3", "cu unit": "unit^3", "unit of area": "unit^2",
    "unit of length": "unit", "unit of volume": "unit^3",
}  # fmt: skip
_BEFORE = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "cu.": 3}
_CHINESE_POWERS = {chinese.SQUARE: 2, chinese.CUBIC: 3}  # one word with the unit
_BEHIND = {"squared": 2, "cubed": 3}
_FILLERS = frozenset(("(", ")", "\\cdot", "*", "\u00b7", "of", "the"))
_TOKEN = re.compile(r"\\?[A-Za-z$\u00a2-\u00a5\u20ac\u20b9.\u3400-\u9fff]+|\^\{?[+-]?\d+\}?|[/()]|\\cdot|[*\u00b7]")


def _dimensions(text: str) -> Dimensions:
    parts = (part.partition("^") for part in text.split())
    return tuple(sorted((name, int(power or 1)) for name, _, power in parts))


_TABLE = {name: Measure(size, _dimensions(text)) for names, size, text in _ROWS for name in names.split()}


def singular(word: str) -> str:
    """A noun without its plural ending; a name of the table stays."""
    if word in _TABLE or len(word) < 3 or not word.endswith("s") or word.endswith("ss"):
        return word
    return word[:-2] if word == "inches" or (word.endswith("es") and word[:-2] in _TABLE) else word[:-1]


def named(word: str) -> Measure | None:
    """What the table says of a word, in the plural as well; symbols keep their case, words do not."""
    word = chinese.UNITS.get(word, word)
    for form in (word, word.lower(), singular(word.lower())):
        if form in _TABLE:
            return _TABLE[form]
    if word[:2] in _CHINESE_POWERS and len(word) > 2:
        base = named(word[2:]) or _unknown(word[2:])
        return _power(base, _CHINESE_POWERS[word[:2]])
    return None


@cache
def measure(unit: str) -> Measure | None:
    """What a unit measures: of `cm^{2}`, `square feet`, `km/h`, `miles per hour`, `kg m s^{-2}`; None if unreadable.

    A word that no row names is a quantity of its own, with `is_known` false.
    """
    unit = _WHOLE.get(" ".join(singular(word) for word in unit.lower().split()), unit)
    total, sign, waiting = Measure(_F(1), ()), 1, 1
    tokens = _TOKEN.findall(unit.replace(chinese.PER, "/"))
    if not tokens or len(tokens) > 12:
        return None
    for place, (token, following) in enumerate(zip(tokens, [*tokens[1:], ""], strict=True)):
        if token in ("/", "per", "a", "an", "each", "every"):
            sign = -1
        elif token in _BEFORE and following:
            waiting = _BEFORE[token]
        elif token[0] == "^" or token in _BEHIND or token in _FILLERS or (token == "in" and place):
            continue
        else:
            power = _BEHIND.get(following) or (int(following.strip("^{}")) if following[:1] == "^" else waiting)
            total, waiting = _product(total, _power(named(token) or _unknown(token), sign * power)), 1
    return total


def ratio(unit: str, other: str) -> Fraction | None:
    """How many of `other` one `unit` is; 0 if they measure different things; None if that is unknown."""
    first, second = measure(unit), measure(other)
    if first is None or second is None:
        return None
    if first.dimensions != second.dimensions:
        return Fraction(0) if first.is_known and second.is_known else None
    return first.size / second.size


def _unknown(word: str) -> Measure:
    word = singular(chinese.UNITS.get(word, word).lower().rstrip("."))
    return Measure(_F(1), ((word, 1),), is_known=False)


def _power(base: Measure, power: int) -> Measure:
    power = max(-9, min(9, power))
    return Measure(base.size**power, tuple((name, n * power) for name, n in base.dimensions), base.is_known)


def _product(left: Measure, right: Measure) -> Measure:
    powers = dict(left.dimensions)
    for name, power in right.dimensions:
        powers[name] = powers.get(name, 0) + power
    dimensions = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Measure(left.size * right.size, dimensions, left.is_known and right.is_known)
