"""Markdown and HTML around an answer: bold, code, headings, fences. `2**3` is a power and stays."""

from __future__ import annotations

import re

_FENCE = re.compile(r"```[A-Za-z]*\s+(.*?)\s*```|```(.*?)```", re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_HEADING = re.compile(r"#{1,6}\s+|[*-]\s+(?=\*\*)")
# Marks that hold words together: nothing that could be a factor stands beside them.
_BOLD = re.compile(r"(?<![\w)\]}*])(\*\*\*|\*\*|__)(?=[^\s*_])(.+?)(?<=[^\s*_])\1(?![\w(\[{\\*])", re.DOTALL)
_ITALIC = re.compile(r"\*(?=[^\s*])([^*]+)(?<=[^\s*])\*|_(?=[^\s_])([^_]+)(?<=[^\s_])_")
_TAG = re.compile(r"</?(?:b|strong|i|em|u|p|span|code|sub|center|math|font)(?:\s[^<>]*)?/?>|<br\s*/?>", re.IGNORECASE)
_MARKS = re.compile(r"[*`#_<>]")


def without_markdown(text: str) -> str:
    """`text` without what only marks it up."""
    if not _MARKS.search(text):
        return text
    if "<" in text:
        text = _TAG.sub("", text)
    if "`" in text:
        text = _FENCE.sub(lambda match: match[1] or match[2] or "", text)
        text = _CODE.sub(r"\1", text)
    if heading := _HEADING.match(text):
        text = text[heading.end() :]
    text = _BOLD.sub(r"\2", text)
    if text.startswith("**") and text.endswith("**") and text.count("**") == 2:
        text = text[2:-2]
    if whole := _ITALIC.fullmatch(text.strip()):
        text = whole[1] or whole[2]
    return text
