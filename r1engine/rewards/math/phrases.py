"""The words behind a value, and the signs around it: a unit, what is counted, a factor such as million, a qualifier."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1engine.rewards.math import angles, units
from r1engine.rewards.math.numerals import AMBIGUOUS, exact_number, factor, spelled, without_groups
from r1engine.rewards.math.structure import split
from r1engine.rewards.math.words import CJK, OPERATORS, is_qualifier

_DEGREE = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*(?:(?:\\(?:text|mathrm)\{\s*)?([CFK])\s*\}?)?$|\s*\\circ$")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*\\?%\s*\})$")
_CURRENCY = re.compile(
    r"([+-]?)\s*(?:\\(?:text|mathrm)\{\s*)?(?:(?:US|U\.S\.|A|C|HK|NT|S)?\s?\\?(\$)|([\u20ac\u00a3\u00a5\u20b9])"
    r"|\b(USD|EUR|GBP|CNY|RMB|INR|Rs)\.?)\s*\}?\s*(?=[\d.(\\+-])"
)
_DOLLAR_BEHIND = re.compile(r"(?<=\d)\s*(?:\\?(\$)|([\u20ac\u00a3\u00a5\u20b9\u00a2]))$")
_MONEY = frozenset("$\u20ac\u00a3\u00a5\u20b9\u00a2")
MAX_WORDS = 12
_PIECE = re.compile(
    rf"\\(?:text|mathrm)\{{(?P<group>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|(?P<command>\\[A-Za-z]+|\\.)"
    r"|(?P<word>[A-Za-z]+(?:['-][A-Za-z]+)*\.?)"
    rf"|(?P<cjk>[{CJK}]+)|(?P<power>\^\{{[+-]?\d\}})|(?P<link>[/\u00b7])|(?P<space>\s+)|.",
    re.DOTALL,
)
_FRACTION_OF_UNITS = re.compile(r"\\frac\{\\(?:text|mathrm)\{([^{}]*)\}\}\{\\(?:text|mathrm)\{([^{}]*)\}(\^\{\d\})?\}$")
_WORDS_AROUND = re.compile(
    r"([A-Za-z][A-Za-z -]*?)\s*\(\s*([+-]?[\d.,]+)\s*\)"
    r"|([+-]?[\d.,]+)\s*\(\s*(?:\\text\{)?([A-Za-z][A-Za-z -]*)\}?\s*\)"
)
CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?:\s*(?:\\text\{)?\s*([ap])\.?\s*m\.?\s*\}?)?", re.IGNORECASE)  # 3:45 p.m.
_MEASURED = re.compile(rf"(\d+(?:\.\d+)?)\s*([A-Za-z.]+|[{CJK}]+)\s*(?:,|and|&)?\s*")
_MARKS = re.compile(rf"[A-Za-z{CJK}^(]")
_PAIRS = frozenset(("cm", "mm", "km", "kg", "mg", "ml", "ft", "yd"))  # units also behind a letter: \\pi hr is a product
_SYMBOLS = frozenset("mgshlLNJW")  # single letters that are units behind a space


@dataclass(frozen=True)
class Phrase:
    """A value and what the words around it say."""

    value: str
    unit: str = ""  # "%", or a phrase that `units.measure` reads
    qualifier: str = ""  # words that make the value another one, as "or more"


def take_phrase(text: str) -> Phrase:
    """The value in `text`, without its unit; factors and operators in words are carried out."""
    if text[-1:].isdigit() and text[:1].isdigit() and not _MARKS.search(text):
        return Phrase(text)
    if (found := _whole(text)) is not None:
        return found
    before = ""
    if currency := _CURRENCY.match(text):
        before = next(group for group in currency.groups()[1:] if group).lower()
        text = currency[1] + text[currency.end() :]
    elif text[-1:] in _MONEY and (currency := _DOLLAR_BEHIND.search(text)):
        before, text = currency[1] or currency[2], text[: currency.start()]
    if (sign := _sign(text)) is not None:
        return sign
    found = _words(text) or Phrase(text)
    if percent := _PERCENT.search(found.value):  # 5\\% \\text{ interest}
        return Phrase(found.value[: percent.start()], "%", found.qualifier)
    if not before:
        return found
    if found.unit in AMBIGUOUS and (number := exact_number(without_groups(found.value))) is not None:
        return Phrase(_decimal(number * AMBIGUOUS[found.unit]), _canonical(before), found.qualifier)  # $5k
    unit = f"{before} {found.unit}" if found.unit.startswith(("/", "per ", "a ", "an ")) else before
    return Phrase(found.value, _canonical(unit), found.qualifier)


def _whole(text: str) -> Phrase | None:
    """What is read as a whole: degrees with minutes, hours with minutes, a time of day, "seven (7)"."""
    if (degrees := angles.in_minutes(text)) is not None:
        return Phrase(_decimal(degrees), "degree")
    if ":" in text and CLOCK.fullmatch(text):
        return Phrase(text)
    if "(" in text and (match := _WORDS_AROUND.fullmatch(text)):
        words, digits = (match[1] or match[4]), (match[2] or match[3])
        value = spelled(re.split(r"[\s-]+", words.lower().strip()))
        if value is not None:
            same = value == exact_number(without_groups(digits))
            return Phrase(digits) if same else Phrase(digits, "", f"({words})")
    plain = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r" \1 ", text).strip()
    parts = list(_MEASURED.finditer(plain)) if plain[:1].isdigit() and re.search(rf"[A-Za-z{CJK}]\W*\d", plain) else []
    if len(parts) < 2 or "".join(part[0] for part in parts) != plain:
        return None
    measures = [one for part in parts if (one := units.named(part[2].rstrip("."))) is not None]
    if len(measures) < len(parts) or len({one.dimensions for one in measures}) > 1:
        return None
    sizes = [one.size for one in measures]
    if sizes != sorted(set(sizes), reverse=True):
        return None
    total = sum(Fraction(part[1]) * one.size for part, one in zip(parts, measures, strict=True))
    return Phrase(_decimal(total / measures[0].size), _canonical(parts[0][2].rstrip(".")))


def _sign(text: str) -> Phrase | None:
    """A percent or degree sign at the end."""
    if text[-1:] in "%}" and (percent := _PERCENT.search(text)):
        return Phrase(text[: percent.start()], "%") if percent.start() else None
    degree = _DEGREE.search(text) if "\\circ" in text else None
    if degree is None or not degree.start() or angles.has_function(text[: degree.start()]):
        return None
    if len(split(text)) > 1:
        return None  # each item has its own
    scale = {"C": "celsius", "F": "fahrenheit", "K": "kelvin", None: "degree"}[degree[1]]
    return Phrase(angles.without_degrees(text[: degree.start()]), scale)


def _words(text: str) -> Phrase | None:
    """Words at the end, the longest run first that says something certain of a value before it."""
    if text[-1:].isdigit():
        return None
    if "frac" in text and (match := _FRACTION_OF_UNITS.search(text)):
        text = f"{text[: match.start()]}\\text{{{match[1]}/{match[2]}{match[3] or ''}}}"
    pieces = list(_PIECE.finditer(text))
    starts: list[tuple[int, str, str]] = []
    phrase, has_group = "", False
    for piece in reversed(pieces):
        if piece.lastgroup not in ("group", "word", "cjk", "power", "link", "space") and piece[0] != "\\cdot":
            break
        if len(starts) > MAX_WORDS:
            return None  # prose
        if piece.lastgroup in ("group", "word", "cjk"):
            has_group |= piece.lastgroup == "group"
            phrase = f"{(piece['group'] or piece[0]) if piece.lastgroup == 'group' else piece[0]} {phrase}"
            starts.append((piece.start(), phrase, piece.lastgroup))
        else:
            phrase = piece[0] + phrase
    for start, found, kind in reversed(starts):
        value = text[:start].rstrip()
        if value.endswith("/") and kind == "group":
            value, found = value[:-1].rstrip(), f"per {found}"
        if value and (read := _read(value, " ".join(found.split()), kind, text[start - 1] == " ")) is not None:
            return read
    return None


_ENDS = re.compile(r"[\d)}\]!'%A-Za-z]$")
_NUMERIC_END = re.compile(r"(?:\d|[)}!%]|\\pi)$")


def _read(value: str, phrase: str, kind: str, has_space: bool) -> Phrase | None:
    """What `phrase` says of `value`; None if it may be no phrase at all, but variables."""
    if not _ENDS.search(value):
        return None
    phrase = re.sub(r"\s+(\^)", r"\1", phrase).strip(" .,()")
    words = phrase.lower().split()
    if not words:
        return None
    scale, rest = Fraction(1), words
    while (
        rest and _NUMERIC_END.search(value) and (kind != "word" or has_space) and (size := factor(rest[0])) is not None
    ):
        scale, rest = scale * size, rest[1:]
    if kind == "cjk" and scale == 1 and not _is_known(phrase, kind, has_space, value):
        scale, rest = _chinese_factor(phrase)
    if scale != 1:
        return _scaled(value, scale, rest)
    if form := OPERATORS.get(" ".join(words)):
        return Phrase(form.format(v=value)) if kind != "word" or len(words) > 1 or has_space else None
    if _is_percent(words):
        return Phrase(value, "%")
    if _is_known(phrase, kind, has_space, value):
        return Phrase(value, _canonical(phrase))
    if words == ["k"] and exact_number(value) is None:
        return None
    if re.fullmatch(r"[A-Za-z]", phrase) and phrase not in AMBIGUOUS:
        return None  # a variable
    if phrase.endswith(" below zero") and _is_known(unit := phrase.removesuffix(" below zero"), kind, has_space, value):
        return Phrase(f"-{value}" if value.isdecimal() else OPERATORS["below zero"].format(v=value), _canonical(unit))
    if not _NUMERIC_END.search(value) or (kind == "word" and not _are_bare_words(words, has_space)):
        return None
    if is_qualifier(phrase):
        return Phrase(value, "", phrase.lower())
    return Phrase(value, _canonical(phrase))


def _is_known(phrase: str, kind: str, has_space: bool, value: str) -> bool:
    """Whether the phrase is a unit for sure. A bare single letter may be a variable: 5 m, but not 5m nor xm."""
    found = units.measure(phrase)
    if found is None or not found.is_known:
        return False
    if kind != "word":
        return True
    first = re.match(r"[A-Za-z.]+", phrase)
    symbol = first[0] if first else phrase
    if len(symbol) == 1:
        return symbol in _SYMBOLS and has_space and value[-1].isdigit()
    if value[-1] in "0123456789)}":
        return True
    return has_space and (len(symbol) > 2 or symbol in _PAIRS)


def _are_bare_words(words: list[str], has_space: bool) -> bool:
    """Whether letters outside of \\text are words and no product: a space before, three letters, a vowel."""
    if words == ["k"]:
        return not has_space
    if not has_space:
        return False
    letters = [re.sub(r"[^a-z]", "", word) for word in words]
    if len(words) == 1 and (
        len(letters[0]) < 3 or (len(letters[0]) == 3 and letters[0] == "".join(sorted(letters[0])))
    ):
        return False
    return all(len(word) > 1 or word == "a" for word in letters) and any(set("aeiou") & set(word) for word in letters)


def _is_percent(words: list[str]) -> bool:
    return " ".join(words) in ("percent", "per cent", "pct", "percentage", "percentage points", "percent points", "\\%")


def _chinese_factor(phrase: str) -> tuple[Fraction, list[str]]:
    for length in (2, 1):
        if (size := factor(phrase[:length])) is not None:
            rest = phrase[length:]
            return size, [rest] if rest else []
    return Fraction(1), [phrase]


def _scaled(value: str, scale: Fraction, rest: list[str]) -> Phrase | None:
    number = exact_number(without_groups(value))
    text = f"({value})\\cdot {_decimal(scale)}" if number is None else _decimal(number * scale)
    phrase = " ".join(rest).removeprefix("of ")
    if phrase and is_qualifier(phrase):
        return Phrase(text, "", phrase)
    return Phrase(text, _canonical(phrase) if phrase else "")


def _decimal(value: Fraction) -> str:
    """A number as text that `exact_number` reads."""
    return str(value)


def _canonical(phrase: str) -> str:
    """One noun in the singular; a compound as it stands."""
    phrase = " ".join(phrase.split()).strip(" .,")
    if re.fullmatch(r"[A-Za-z]{3,}", phrase):
        return units.singular(phrase.lower())
    return phrase
