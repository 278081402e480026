"""Divides a completion into thoughts and the rest; what reads `<think>` in a completion starts here.

Only the format rule looks at the tags themselves, see format.py: it asks whether they are as they should be, and this
file finds the thoughts also where they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class SplitCompletion:
    """A completion, divided at its last `</think>`."""

    thoughts: str | None  # None: there is no think tag
    rest: str  # what follows the last `</think>`; "" if there is none, and the whole text if there is no tag at all
    is_open: bool  # at the end a block is open: it was never closed, or thoughts begin again in the rest


def split_thoughts(text: str, *, think_prefilled: bool = False) -> SplitCompletion:
    """The thoughts, from where the first block opens to the last `</think>`, and what follows them.

    A text whose first tag is `</think>` starts inside the block: a prompt may end with `<think>`. A block that is never
    closed reaches to the end of the text.

    Args:
        text: what the model wrote after the prompt.
        think_prefilled: the prompt itself ended with `<think>`.
    """
    first_opening, first_closing = text.find(OPENING), text.find(CLOSING)
    starts_inside = think_prefilled or 0 <= first_closing < first_opening or (first_opening < 0 <= first_closing)
    if not starts_inside and first_opening < 0:
        return SplitCompletion(None, text, is_open=False)
    start = 0 if starts_inside else first_opening + len(OPENING)
    end = text.rfind(CLOSING)
    if end < 0:
        return SplitCompletion(text[start:], "", is_open=True)
    return SplitCompletion(text[start:end], text[end + len(CLOSING) :], is_open=text.rfind(OPENING) > end)
