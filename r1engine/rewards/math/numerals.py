"""Exact numbers in every notation: decimals, fractions, powers of ten, repeating decimals, grouped digits, words.

One table row a notation. All values are fractions; what is no number is None.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from r1engine.rewards.math import chinese

MAX_CHARACTERS = 1000  # Python refuses int() beyond 4,300 digits, and no answer is that long
MAX_EXPONENT = 1000  # of ten

_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = rf"[+-]?{_UNSIGNED}"
_TIMES = r"\s*(?:\\times|\\cdot|[*xX])\s*"


def _decimal(match: re.Match[str]) -> Fraction | None:
    return Fraction(int(match[0]) if match[0].isdecimal() else match[0])


def _fraction(match: re.Match[str]) -> Fraction | None:
    sign, above, below = match.groups()
    if above.isdecimal() and below.isdecimal():
        return Fraction(int(sign + above), int(below)) if int(below) else None
    return Fraction(sign + "1") * Fraction(above) / Fraction(below) if Fraction(below) else None


def _mixed(match: re.Match[str]) -> Fraction | None:
    sign, whole, above, below = match.groups()
    return None if not int(below) else (-1 if sign == "-" else 1) * (int(whole) + Fraction(int(above), int(below)))


def _power_of_ten(match: re.Match[str]) -> Fraction | None:
    sign, factor, exponent = match.groups()
    if abs(int(exponent)) > MAX_EXPONENT:
        return None
    return (-1 if sign == "-" else 1) * Fraction(factor or 1) * Fraction(10) ** int(exponent)


# (what is in every text of that notation, its pattern, its reader)
_NOTATIONS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], Fraction | None]], ...] = tuple(
    (mark, re.compile(pattern, re.ASCII), read)
    for mark, pattern, read in (
        ("", _NUMBER, _decimal),
        ("/", rf"([+-]?)({_UNSIGNED})\s?/\s?({_NUMBER})", _fraction),
        ("/", r"([+-]?)(\d+)\s+(\d+)\s?/\s?(\d+)", _mixed),
        ("\\frac", rf"([+-]?)\\frac\{{\s*({_NUMBER})\s*\}}\{{\s*({_NUMBER})\s*\}}", _fraction),
        ("\\frac", r"([+-]?)(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", _mixed),
        ("^", rf"([+-]?)(?:({_UNSIGNED}){_TIMES})?10\s*\^\{{([+-]?\d{{1,5}})\}}", _power_of_ten),
        ("e", rf"([+-]?)({_UNSIGNED})e([+-]?\d{{1,5}})", _power_of_ten),
        ("E", rf"([+-]?)({_UNSIGNED})E([+-]?\d{{1,5}})", _power_of_ten),
    )
)


def exact_number(text: str) -> Fraction | None:
    """Exact value of a number, as -3, 0.25, 1/4, 1 1/2, \\frac{1}{4}, 3e8, 3 \\times 10^{8}; None for anything else."""
    if len(text) > MAX_CHARACTERS:
        return None
    if text[:1] in ("+", "-") and text[1:2] == " ":
        text = text[0] + text[1:].lstrip()
    for mark, pattern, read in _NOTATIONS:
        if mark in text and (match := pattern.fullmatch(text)):
            return read(match)
    return None


# ---- digits in groups of three ---------------------------------------------------------------------------------

_GROUPED = re.compile(
    r"[+-]?\d{1,3}(?:(?:(?:,|\{,\})\d{3})+|(?: \d{3})+|(?:_\{\d{3}\})+|(?:'\d{3})+)(?:\.\d+)?"
    r"|[+-]?\d{1,3}(?:\.\d{3}){2,}|[+-]?\d+\.\d{3}(?: \d{3})*(?: \d{1,3})",
    re.ASCII,
)
_LAST = frozenset("0123456789}")
_OPERATOR, _BRACKET = re.compile(r"\d\s*[+*/=-]|\\(?:times|cdot|div)(?![a-z])"), re.compile(r"[(\[{]")
_GROUPED_INSIDE = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_INDIAN = re.compile(r"[+-]?\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?", re.ASCII)  # twelve lakh is 12,00,000


def without_groups(text: str) -> str:
    """1234567 for 1,234,567, 1 234 567, 1_{234}_{567}, 1'234'567 and 1.234.567; any other text as it is."""
    if text[-1:] not in _LAST or text.isdigit() or not _GROUPED.fullmatch(text):
        return text
    if text.count(".") > 1:
        return text.replace(".", "")
    return re.sub(r"[,{} _']", "", text)


def sum_without_groups(text: str) -> str:
    """1874 + 1 = 1875 for 1874 + 1 = 1,875: beside an operator, in no bracket, a comma without a space groups."""
    if "," not in text or ", " in text or _BRACKET.search(text) or not _OPERATOR.search(text):
        return text
    return _GROUPED_INSIDE.sub(lambda match: match[0].replace(",", ""), text)


def may_be_grouped(text: str, number: Fraction) -> bool:
    """Whether a list such as 1, 234 may be meant as that number."""
    return re.fullmatch(r"[+-]?\d{1,3}(?:, ?\d{3})+", text) is not None and int(re.sub("[, ]", "", text)) == number


def indian(text: str) -> Fraction | None:
    """1234567 for 12,34,567, which can also be a list of three numbers; None for anything else."""
    return Fraction(text.replace(",", "")) if _INDIAN.fullmatch(text) else None


# ---- repeating decimals ----------------------------------------------------------------------------------------

_REPEATING = (
    re.compile(r"(?P<whole>\d*)\.(?P<start>\d*)\\overline\{(?P<cycle>\d+)\}", re.ASCII),
    re.compile(
        r"(?P<whole>\d*)\.(?P<start>\d*)\\dot\{(?P<cycle>\d)\}(?:(?P<more>\d*)\\dot\{(?P<last>\d)\})?",
        re.ASCII,
    ),
    re.compile(r"(?P<whole>\d+)\.\((?P<cycle>\d+)\)", re.ASCII),
    re.compile(r"(?<![\d.])(?P<whole>0)\.(?P<start>\d+)\((?P<cycle>\d+)\)", re.ASCII),  # 1.5(2) is a product
    re.compile(
        r"(?P<whole>\d+)\.(?P<start>\d{0,20}?)"
        r"(?:(?P<cycle>\d)(?P=cycle){2,}|(?P<block>\d{2,9})(?P=block)+)(?:\.\.\.|\\[lc]?dots)",
        re.ASCII,
    ),
)  # fmt: skip


def without_repeating(text: str) -> str:
    """0.1\\overline{6} as \\frac{1}{6}, anywhere in a text; also \\dot, a bracket, and digits repeated before `...`."""
    if "." in text and ("\\" in text or "(" in text or "..." in text):
        for notation in _REPEATING:
            text = notation.sub(_as_fraction, text)
    return text


def _as_fraction(match: re.Match[str]) -> str:
    groups = {name: digits or "" for name, digits in match.groupdict().items()}
    start = groups.get("start", "")
    cycle = groups["cycle"] + groups.get("more", "") + groups.get("last", "") or groups["block"]
    nines = 10 ** len(start) * (10 ** len(cycle) - 1)
    value = int(groups["whole"] or 0) + Fraction(int(start + cycle) - int(start or 0), nines)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


# ---- words -----------------------------------------------------------------------------------------------------

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SMALL = {word: value for value, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
STARTS = frozenset((*_SMALL, "half", "minus", "negative", "a", "an"))  # the first word of a number that is spelled out
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
          "ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000, "millionth": 10**6}  # fmt: skip
# What multiplies the number before it; a word in the plural as well.
_FACTORS: dict[str, Fraction] = {
    **{name: Fraction(scale) for name, scale in _SCALES.items()},
    **{name: Fraction(1, part) for name, part in _PARTS.items() if name != "quarter"},
    "halve": Fraction(1, 2), "dozen": Fraction(12), "lakh": Fraction(10**5), "crore": Fraction(10**7),
    "mn": Fraction(10**6), "mln": Fraction(10**6), "mil": Fraction(10**6), "bn": Fraction(10**9),
    **{sign: Fraction(scale) for sign, scale in (chinese.TENS | chinese.MYRIADS).items()},
    **{ten + myriad: Fraction(n * m) for ten, n in chinese.TENS.items() for myriad, m in chinese.MYRIADS.items()},
    chinese.DOZEN: Fraction(12),
}  # fmt: skip
# Words that count single things or multiply: three pairs are 3 or 6.
AMBIGUOUS = {"pair": Fraction(2), "couple": Fraction(2), "quarter": Fraction(1, 4), "score": Fraction(20),
             "gross": Fraction(144), "k": Fraction(1000),
             "M": Fraction(10**6), "B": Fraction(10**9)}  # fmt: skip


def factor(word: str) -> Fraction | None:
    """What a number is multiplied by for a word behind it: million, dozens, tenths."""
    return _FACTORS.get(word) or (_FACTORS.get(word[:-1]) if word.endswith("s") else None)


def spelled(words: list[str]) -> Fraction | None:
    """The number that English words spell out: two hundred and five, minus three, three quarters; None for others."""
    if words[:1] in (["minus"], ["negative"]):
        value = spelled(words[1:])
        return None if value is None else -value
    if len(words) > 1 and (part := _part(words[-1])):
        above = Fraction(1) if words[:-1] in (["a"], ["an"]) else spelled(words[:-1])
        return None if above is None or above.denominator > 1 or above >= 20 else above / part
    if words == ["half"]:
        return Fraction(1, 2)
    if words[:2] in (["half", "a"], ["half", "an"]):
        scale = spelled(words[1:])
        return None if scale is None else scale / 2
    total = group = 0
    last = ""
    for word in words:
        if word in _SMALL:
            if last in _SMALL and not (_SMALL[last] >= 20 and 0 < _SMALL[word] < 10):
                return None
            group += _SMALL[word]
        elif word == "hundred" and group < 100:
            group = (group or 1) * 100
        elif word in _SCALES and word != "hundred":
            total, group = total + (group or 1) * _SCALES[word], 0
        elif word == "dozen":
            group = (group or 1) * 12
        elif not ((word == "and" and last in _SCALES) or (word == "a" and not last)):
            return None
        last = word
    return None if last in ("", "and", "a") else Fraction(total + group)


def _part(word: str) -> int | None:
    return 2 if word == "halves" else _PARTS.get(word) or (_PARTS.get(word[:-1]) if word.endswith("s") else None)


def spelled_in_chinese(text: str) -> Fraction | None:
    """The number that Chinese numerals spell out, also as a fraction or with a decimal point; None for others."""
    if text[:1] in chinese.NEGATIVES:
        value = spelled_in_chinese(text[1:])
        return None if value is None else -value
    below, fraction, above = text.partition(chinese.PARTS_OF)
    if fraction:
        denominator = Fraction(chinese.TENS[below]) if below in chinese.TENS else spelled_in_chinese(below)
        numerator = spelled_in_chinese(above)
        return None if numerator is None or not denominator else numerator / denominator
    whole, point, decimals = text.partition(chinese.POINT)
    value = _whole_in_chinese(whole)
    if not point or value is None:
        return value
    if not decimals or any(digit not in chinese.DIGITS for digit in decimals):
        return None
    return value + Fraction(int("".join(str(chinese.DIGITS[digit]) for digit in decimals)), 10 ** len(decimals))


def _whole_in_chinese(text: str) -> Fraction | None:
    total = group = 0
    digit: int | None = None
    for sign in text:
        if sign in chinese.DIGITS:
            if digit:  # two digits in a row: a year or a telephone number
                return None
            digit = chinese.DIGITS[sign]
        elif sign in chinese.TENS:
            group, digit = group + (1 if digit is None else digit) * chinese.TENS[sign], None
        elif sign in chinese.MYRIADS:
            total, group, digit = (total + group + (digit or 0)) * chinese.MYRIADS[sign], 0, None
        else:
            return None
    return Fraction(total + group + (digit or 0)) if text else None
