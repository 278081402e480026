"""The shape of an answer: set, tuple, interval, list, vector, chain of equations, and the parts of each."""

from __future__ import annotations

import re

_OPEN, _CLOSE = "([{", ")]}"
_RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|leqslant|geqslant|lt|gt|ne|neq)(?![a-z])")
_RELATION_OR_BRACKET = re.compile(_RELATION.pattern + r"|[(\[{}\])]")
_INEQUALITY = re.compile(r"<|>|\\(?:le|ge|leq|geq|leqslant|geqslant|lt|gt)(?![a-z])")
_COLUMN = re.compile(r"\\begin\{([pb]?matrix)\}\s*([^&]*?)\s*(?:\\\\)?\s*\\end\{\1\}")
_ROW = re.compile(r"\\begin\{([pb]?matrix)\}\s*((?:(?!\\\\).)*?&(?:(?!\\\\).)*?)\s*(?:\\\\)?\s*\\end\{\1\}", re.DOTALL)
_ANGLES = re.compile(r"\\langle\s*(.+?)\s*\\rangle")


def kind(text: str) -> str:
    """set, pair (a tuple or an open interval: both are written (1, 2)), interval, list, vector, relation or other.

    Braces without backslash are no set: LaTeX does not print them.
    """
    is_enclosed = _closing(text) == len(text) - 1
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if is_enclosed and len(split(text[1:-1])) > 1:
        if text[0] == "(" and text[-1] == ")":
            return "pair"
        if text[0] in "([" and text[-1] in ")]":
            return "interval"
        return "list"  # {1, 2}
    if _is_vector(text):
        return "vector"
    if len(split(text)) > 1:
        return "list"
    return "relation" if has_relation(text) else "other"


def items(text: str, shape: str) -> list[str]:
    """What a collection of that kind holds."""
    if shape == "vector":
        return _vector(text)
    if shape == "set":
        text = text[2:-2]
    elif shape in ("pair", "interval") or (shape == "list" and text[0] == "{" and _closing(text) == len(text) - 1):
        text = text[1:-1]
    return [item for item in split(text) if item.strip()]


def split(text: str) -> list[str]:
    """Parts between the commas that stand in no bracket; between the semicolons, if there are any.

    With both, each part is a tuple: 5, 2; 7, 2 is (5, 2), (7, 2).
    """
    if len(parts := split_at(text, ";")) > 1:
        return [f"({part.strip()})" if len(split_at(part, ",")) > 1 else part for part in parts]
    return split_at(text, ",")


def chain(text: str) -> list[str]:
    """The members of a chain of equations a = b = c; one member if there is none, or it is a list or an inequality."""
    if len(split(text)) > 1 or _INEQUALITY.search(text) or re.search(r"!=|\\neq?(?![a-z])", text):
        return [text]
    return [part.strip() for part in split_at(text, "=")]


def has_inequality(text: str) -> bool:
    """Whether < or one of its kind is in it."""
    return _INEQUALITY.search(text) is not None


def has_relation(text: str) -> bool:
    """Whether an equation or inequality stands outside of all brackets: not in \\sum_{k=1}."""
    depth = 0
    for match in _RELATION_OR_BRACKET.finditer(text):
        depth += (match[0] in _OPEN) - (match[0] in _CLOSE)
        if depth == 0 and match[0] not in _CLOSE:
            return True
    return False


def split_at(text: str, separator: str) -> list[str]:
    """Parts between the separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def _vector(text: str) -> list[str]:
    """The entries of a column, a row, or \\langle 1, 2 \\rangle; fewer than two if `text` is no vector."""
    if column := _COLUMN.fullmatch(text):
        return [part.strip() for part in column[2].split("\\\\")]
    if row := _ROW.fullmatch(text):
        return [part.strip() for part in row[2].split("&")]
    angles = _ANGLES.fullmatch(text)
    return [part.strip() for part in split(angles[1])] if angles else []


def _is_vector(text: str) -> bool:
    return text.startswith(("\\begin", "\\langle")) and len(_vector(text)) > 1


def _closing(text: str) -> int:
    """Position where the bracket that `text` starts with is closed; -1 if it starts with none or is not closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return position if text[0] in _OPEN else -1
    return -1
