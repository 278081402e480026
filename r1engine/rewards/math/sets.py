"""Rule for sets of real numbers: intervals, inequalities, set builders, unions, "all real numbers"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1engine.rewards.math import chinese
from r1engine.rewards.math.decision import Comparer, Decision, all_of
from r1engine.rewards.math.normalize import Answer, normalize
from r1engine.rewards.math.structure import has_inequality, kind, split, split_at
from r1engine.rewards.math.words import any_of

_REALS = re.compile(
    r"\\mathbb\{R\}|(?:the )?(?:set of )?(?:all )?(?:the )?(?:real numbers|reals)|\\text\{R\}|R"
    rf"|{any_of(chinese.REALS)}",
    re.IGNORECASE,
)
_INTERVAL = re.compile(r"([(\[\]])([^,;]+)[,;]([^,;]+)([)\]\[])")
_BUILDER = re.compile(
    r"\\\{\s*(?P<name>[A-Za-z])\s*(?:\\in\s*(?:\\mathbb\{R\}|R)\s*)?(?:\||:|;|,)\s*(?P<condition>.+)\\\}"
)
_POINTS = re.compile(r"\\\{([^{}|:]+(?:\{[^{}]*\}[^{}|:]*)*)\\\}")
_SIGN = re.compile(r"\\(?:le|ge|neq)(?![a-z])|<|>")
_UNKNOWN = re.compile(r"[A-Za-z]|\\(?:theta|alpha|beta|lambda|mu)")
_DOMAIN = re.compile(r"[,;]?\s*(?:\\text\{\s*(?:for|where)?\s*\}\s*)?[A-Za-z]\s*\\in\s*\\mathbb\{R\}$")
_INFINITE = {"\\infty": 1, "+\\infty": 1, "-\\infty": -1}
_EXCLUDED = "\\setminus"


@dataclass(frozen=True)
class _End:
    text: str
    value: Fraction | None  # None: infinite, or no exact number
    infinite: int = 0  # -1, 0, 1


@dataclass(frozen=True)
class _Piece:
    low: _End
    has_low: bool
    high: _End
    has_high: bool


@dataclass(frozen=True)
class _Set:
    pieces: tuple[_Piece, ...]
    is_condition: bool  # written with an unknown: x > 3
    is_certain: bool  # no pair of numbers can look like that


_LEAST, _MOST = _End("-\\infty", None, -1), _End("\\infty", None, 1)
_ALL = _Piece(_LEAST, False, _MOST, False)


def is_set(answer: Answer) -> bool:
    """Whether an answer is a set of real numbers for sure."""
    found = _read(answer)
    return found is not None and found.is_certain


def sets(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """The same real numbers. An interval where the other side has a condition is a matter of the policy."""
    if answer.text.isalnum() and reference.text.isalnum():
        return None
    required = _read(reference)
    found = _read(answer) if required is not None else None
    if found is None or required is None:
        return _by_computing(judge, answer, reference)
    if not (found.is_certain or required.is_certain):
        return None
    verdict, reason = _compared(judge, found, required)
    if verdict != "right" or found.is_condition == required.is_condition or _is_everything(required):
        return verdict, reason
    if not judge.policy.interval_may_be_inequality:
        return "undecided", "an interval against an inequality"
    return verdict, reason


def _by_computing(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """An interval against a condition that is not read here, such as 1 < |z| < 2."""
    conditions = [has_inequality(side.text) for side in (answer, reference)]
    other = (reference if conditions[0] else answer).text
    if sum(conditions) != 1 or not (kind(other) in ("interval", "pair") or "\\cup" in other):
        return None
    if not judge.policy.interval_may_be_inequality:
        return "undecided", "an interval against an inequality"
    texts = [side.equation or side.text for side in (answer, reference)]
    if conditions[0]:  # Math-Verify takes them only the other way round
        verdict, reason = judge.compute(*texts[::-1])
        if verdict == "right":
            return verdict, reason
    return judge.compute(*texts)


def _is_everything(found: _Set) -> bool:
    return found.pieces == (_ALL,)


def _compared(judge: Comparer, found: _Set, required: _Set) -> Decision:
    ends = [end for piece in (*found.pieces, *required.pieces) for end in (piece.low, piece.high)]
    if all(end.value is not None or end.infinite for end in ends):
        same = _merged(found.pieces) == _merged(required.pieces)
        return ("right", "the same set") if same else ("wrong", "another set")
    if len(found.pieces) != len(required.pieces):
        return "undecided", "sets in different pieces"
    left, decisions = list(required.pieces), []
    for piece in found.pieces:
        tried = [_same_piece(judge, piece, other) for other in left]
        best = next((n for verdict in ("right", "undecided") for n, d in enumerate(tried) if d[0] == verdict), None)
        if best is None:
            return tried[0] if len(tried) == 1 else ("wrong", "another set")
        decisions.append(tried[best])
        del left[best]
    verdict, reason = all_of(decisions)
    return (verdict, "the same set") if verdict == "right" else (verdict, reason)


def _same_piece(judge: Comparer, piece: _Piece, other: _Piece) -> Decision:
    if (piece.has_low, piece.has_high) != (other.has_low, other.has_high):
        return "wrong", "the ends of the interval differ"
    decisions: list[Decision] = []
    for end, other_end in ((piece.low, other.low), (piece.high, other.high)):
        if end.infinite or other_end.infinite:
            decisions.append(("right", "") if end.infinite == other_end.infinite else ("wrong", "another end"))
        else:
            decisions.append(judge.compare(normalize(end.text), normalize(other_end.text)))
    return all_of(decisions)


_Order = tuple[int, Fraction]  # infinite, value
_Span = tuple[_Order, bool, _Order, bool]  # the ends of a piece, and whether it has them


def _order(end: _End) -> _Order:
    return end.infinite, end.value or Fraction(0)


def _merged(pieces: tuple[_Piece, ...]) -> list[_Span]:
    """Pieces with exact ends, sorted, those that touch joined."""
    spans: list[_Span] = []
    for piece in sorted(pieces, key=lambda piece: (_order(piece.low), not piece.has_low)):
        low, high = _order(piece.low), _order(piece.high)
        if low > high or (low == high and not (piece.has_low and piece.has_high)):
            continue
        if spans and (low < spans[-1][2] or (low == spans[-1][2] and (piece.has_low or spans[-1][3]))):
            if (high, piece.has_high) > spans[-1][2:]:
                spans[-1] = (*spans[-1][:2], high, piece.has_high)
        else:
            spans.append((low, piece.has_low, high, piece.has_high))
    return spans


# ---- reading ---------------------------------------------------------------------------------------------------


def _read(answer: Answer) -> _Set | None:
    """The set that an answer is, or None."""
    text = answer.text
    if len(text) > 300:
        return None
    if _REALS.fullmatch(text):
        return _Set((_ALL,), False, True) if len(text) > 1 or answer.equation else None
    if text.startswith("\\{") and (builder := _BUILDER.fullmatch(text)):
        found = _condition(builder["condition"], builder["name"])
        return _Set(found, False, True) if found is not None else None
    if _SIGN.search(text):
        found = _condition(_DOMAIN.sub("", text), None)
        return _Set(found, True, True) if found is not None else None
    return _union(text)


def _union(text: str) -> _Set | None:
    """Intervals and sets of points joined by \\cup, or one without points."""
    whole, minus, excluded = text.partition(_EXCLUDED)
    parts = [part.strip() for part in re.split(r"\\cup(?![a-z])", whole)]
    pieces: list[_Piece] = []
    for part in parts:
        if _REALS.fullmatch(part) and len(part) > 1:
            pieces.append(_ALL)
        elif interval := _INTERVAL.fullmatch(part):
            pieces.append(_interval(interval))
        elif len(parts) > 1 and (points := _POINTS.fullmatch(part)):
            pieces += [_point(point) for point in split(points[1])]
        else:
            return None
    if minus:
        points = _POINTS.fullmatch(excluded.strip())
        without = _without(pieces, [_end(point) for point in split(points[1])]) if points else None
        return _Set(without, False, True) if without is not None else None
    certain = (
        len(parts) > 1
        or text[0] == "]"
        or text[-1] == "["
        or "\\infty" in text
        or (text[0] == "[") != (text[-1] == "]")
    )
    return _Set(tuple(pieces), False, certain)


def _interval(match: re.Match[str]) -> _Piece:
    return _Piece(_end(match[2]), match[1] == "[", _end(match[3]), match[4] == "]")


def _point(text: str) -> _Piece:
    return _Piece(_end(text), True, _end(text), True)


def _end(text: str) -> _End:
    text = text.strip()
    if (sign := _INFINITE.get(text.replace(" ", ""))) is not None:
        return _LEAST if sign < 0 else _MOST
    return _End(text, normalize(text).number)


def _without(pieces: list[_Piece], points: list[_End]) -> tuple[_Piece, ...] | None:
    """Pieces cut at points; None where their order is unknown."""
    if any(point.value is None for point in points):
        return None
    for point in points:
        cut = []
        for piece in pieces:
            if not all(end.value is not None or end.infinite for end in (piece.low, piece.high)):
                return None
            if _order(piece.low) <= _order(point) <= _order(piece.high):
                cut += [
                    _Piece(piece.low, piece.has_low, point, False),
                    _Piece(point, False, piece.high, piece.has_high),
                ]
            else:
                cut.append(piece)
        pieces = cut
    return tuple(pieces)


def _condition(text: str, name: str | None) -> tuple[_Piece, ...] | None:
    """What an inequality, or several of them, says of one unknown."""
    parts = [part.strip() for part in split(text)]
    found = [one for part in parts if (one := _inequality(part, name)) is not None]
    if len(found) < len(parts) or len({known for _, known in found}) > 1:
        return None
    if len(found) == 1:
        return found[0][0]
    if all("\\neq" in part for part in parts):
        points = [_end(part.split("\\neq")[1]) for part in parts]
        return _without([_ALL], points)
    pieces = tuple(piece for some, _ in found for piece in some)
    ends = [end for piece in pieces for end in (piece.low, piece.high)]
    if not all(end.value is not None or end.infinite for end in ends) or len(pieces) != 2:
        return None
    # x < 1, x > 2 can only mean "or"; x > 1, x < 2 only "and".
    return pieces if len(_merged(pieces)) == 2 else _both(*pieces)


def _both(first: _Piece, second: _Piece) -> tuple[_Piece, ...]:
    low = max((first, second), key=lambda piece: (_order(piece.low), not piece.has_low))
    high = min((first, second), key=lambda piece: (_order(piece.high), piece.has_high))
    return (_Piece(low.low, low.has_low, high.high, high.has_high),)


def _inequality(text: str, name: str | None) -> tuple[tuple[_Piece, ...], str] | None:
    """(pieces, unknown) of x > 3, 1 < x \\le 2, x \\neq 1; None for anything else."""
    signs = [sign[0].replace("\\le", "<=").replace("\\ge", ">=") for sign in _SIGN.finditer(text)]
    sides = [side.strip() for side in _SIGN.split(text)]
    if len(signs) not in (1, 2) or len(split_at(text, "=")) > 1 or not all(sides):
        return None
    unknown = sides[1] if len(signs) == 2 or not _UNKNOWN.fullmatch(sides[0]) else sides[0]
    if not _UNKNOWN.fullmatch(unknown) or (name and unknown != name) or all(map(_UNKNOWN.fullmatch, sides)):
        return None
    if any(
        re.search(rf"(?<![A-Za-z\\]){re.escape(unknown)}(?![A-Za-z])", side)
        for side in sides
        if side is not unknown and side != unknown
    ):
        return None
    if len(signs) == 1:
        (sign,), other = signs, sides[1] if unknown == sides[0] else sides[0]
        if sign == "\\neq":
            end = _end(other)
            return ((_Piece(_LEAST, False, end, False), _Piece(end, False, _MOST, False)), unknown)
        is_below = sign.startswith("<") == (unknown == sides[0])
        piece = (
            _Piece(_LEAST, False, _end(other), sign.endswith("="))
            if is_below
            else _Piece(_end(other), sign.endswith("="), _MOST, False)
        )
        return (piece,), unknown
    if "\\neq" in signs or signs[0][0] != signs[1][0]:
        return None
    if signs[0][0] == ">":
        sides, signs = sides[::-1], signs[::-1]
    return (_Piece(_end(sides[0]), signs[0].endswith("="), _end(sides[2]), signs[1].endswith("=")),), unknown
