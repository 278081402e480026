"""Finds the final answer in a completion; strict, so that thoughts and attempts do not count."""

from __future__ import annotations

import re
from dataclasses import dataclass

from r1engine.rewards.thoughts import split_thoughts

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are set braces, not groups
_HASHES = re.compile(r"(?:^|\n)####[ \t]*(\S[^\n]*)\s*\Z")
MAX_ANSWER_CHARACTERS = 2000  # longer answers are undecided
_SEARCHED_CHARACTERS = 200_000  # at the end of a completion, for a box


def final_answer(text: str, *, think_prefilled: bool = False) -> tuple[str | None, str]:
    """(the answer, "") or (None, why there is none).

    - Only what follows the last `</think>` counts. A think block that is open at the end holds no answer. A text
      without think tags counts as a whole.
    - With an `<answer>` tag, only the last `<answer>` block counts, whatever came before it; it must be closed.
      Inside it the last `\\boxed{}` is the answer, or else all of it.
    - Without one, the last `\\boxed{}` is the answer; without a box, a last line `#### answer`, as in GSM8K.
    - The last `\\boxed{` must be balanced (`\\{` and `\\}` do not count); an unterminated one is no answer, even if a
      complete one came before. A box in a box is unwrapped.
    - A blank answer is none. A box is searched in the last 200,000 characters.

    Args:
        text: what the model wrote after the prompt.
        think_prefilled: the prompt itself ended with `<think>`.
    """
    region, why_none = answer_region(text, think_prefilled=think_prefilled)
    if region is None:
        return None, why_none
    searched = region.text[-_SEARCHED_CHARACTERS:]
    box = last_boxed(searched)
    if box is None:
        if "\\boxed" in searched:
            return None, "the last \\boxed{ is not closed"
        if not region.is_tagged:
            if (line := _HASHES.search(searched)) is None:
                return None, "no answer block and no \\boxed{}"
            searched = line[1]
        box = searched
    while len(box) <= MAX_ANSWER_CHARACTERS and (inner := last_boxed(box)) is not None:
        box = inner
    return (box.strip(), "") if box.strip() else (None, "the answer is blank")


@dataclass(frozen=True)
class AnswerRegion:
    """The part of a completion that may hold the answer."""

    text: str
    is_tagged: bool  # it is the content of an `<answer>` block


def answer_region(text: str, *, think_prefilled: bool = False) -> tuple[AnswerRegion | None, str]:
    """(what follows the thoughts, or the last `<answer>` block in it, "") or (None, why there is none)."""
    split = split_thoughts(text, think_prefilled=think_prefilled)
    if split.is_open:
        return None, "the think block is not closed"
    _, tag, block = split.rest.rpartition("<answer>")
    if not tag:
        return AnswerRegion(split.rest, is_tagged=False), ""
    content, closing, _ = block.partition("</answer>")
    return (AnswerRegion(content, is_tagged=True), "") if closing else (None, "the answer block is not closed")


def last_boxed(text: str) -> str | None:
    """Content of the last outermost `\\boxed{...}`; None if there is none or it is not closed."""
    content, position = None, text.find("\\boxed")
    while position >= 0:
        start = position + len("\\boxed")
        while start < len(text) and text[start].isspace():
            start += 1
        end = matching_brace(text, start)
        if end is None:
            return None
        content = text[start + 1 : end]
        position = text.find("\\boxed", end)
    return content


def matching_brace(text: str, start: int) -> int | None:
    """Position of the `}` that closes the `{` at `start`; None if there is no `{` there or it is never closed."""
    if not text.startswith("{", start):
        return None
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
