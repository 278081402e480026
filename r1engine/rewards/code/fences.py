"""Fenced code blocks as CommonMark 4.5 has them, also inside lists and quotations."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What may stand before a fence: marks of a quotation, a list item, and an indent.
_OPENING = re.compile(
    r"(?P<before>(?:[ \t]*>)*[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)"
)
_CLOSING = re.compile(r"(?:[ \t]*>)*(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*$")
_QUOTATION = re.compile(r"(?:[ \t]*>)+ ?")

# language -> the first word of the info string, in small letters
_LANGUAGES = {
    "python": re.compile(r"(?:python|py|pypy|cpython)[\d.]*"),
    "cpp": re.compile(r"(?:c\+\+|cpp|cc|cxx|g\+\+|gnu\+\+)[\da-z]{0,2}"),
}


@dataclass(frozen=True)
class CodeBlock:
    """What stands in one fence."""

    name: str  # first word of the info string, in small letters; "" if there is none
    code: str  # without the fence's own indent

    def is_of(self, language: str) -> bool:
        """Whether the name is one of the language's."""
        return _LANGUAGES[language].fullmatch(self.name) is not None


def fenced_blocks(text: str) -> tuple[list[CodeBlock], bool]:
    """(closed blocks in their order, whether one is open at the end).

    A fence in a list has the indent of its list item, which its lines lose. It is closed by a fence of the same sign
    that is at least as long and indented by at most three spaces more.
    """
    blocks: list[CodeBlock] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if opened is None:
            if ("```" in line or "~~~" in line) and (opened := _OPENING.fullmatch(line.rstrip())):
                lines = []
        elif _closes(line, opened):
            blocks.append(CodeBlock(_name(opened["info"]), "\n".join(lines)))
            opened = None
        else:
            lines.append(_without_indent(line, opened["before"]))
    return blocks, opened is not None


def _closes(line: str, opened: re.Match[str]) -> bool:
    match = _CLOSING.fullmatch(line.rstrip()) if "```" in line or "~~~" in line else None
    if match is None:
        return False
    indent = len(_QUOTATION.sub("", opened["before"]))
    return match["fence"].startswith(opened["fence"]) and len(match["indent"]) <= indent + 3


def _without_indent(line: str, before: str) -> str:
    if ">" in before:
        line, before = _QUOTATION.sub("", line, count=1), _QUOTATION.sub("", before, count=1)
    blank = len(line) - len(line.lstrip(" \t"))
    return line[min(blank, len(before)) :]


def _name(info: str) -> str:
    """python of `Python title="a.py"`, `{.python .numbers}`, `python:main.py` and `language-python`."""
    word = re.split(r"[\s,:;{}]+", info.strip().lstrip("{. "), maxsplit=1)[0].lower()
    return re.sub(r"^(?:language|lang)-", "", word)
