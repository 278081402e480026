"""The format rule: `<think> ... </think>` once, then `<answer> ... </answer>` once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from r1engine.rewards.record import Record
from r1engine.rewards.rule import Grade, Rule, find_all

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_problem(text: str, *, think_prefilled: bool = False, blank_think_allowed: bool = False) -> str:
    """What breaks the format, or "" for a well-formed completion.

    Well-formed: the four tags `<think> </think> <answer> </answer>`, each exactly once and in this order, nothing
    but white space before, between and after the two blocks, and neither block blank.

    Args:
        text: what the model wrote after the prompt.
        think_prefilled: the prompt itself ended with `<think>`, so the text starts inside the block; a second
            `<think>` is then one too many.
        blank_think_allowed: the rule then asks only where the reasoning stands, not that there is any.
    """
    if think_prefilled:
        text = TAGS[0] + text
    expected, end = 0, 0  # index into TAGS; end of the tag before
    for tag, start in _tags(text):
        if expected == len(TAGS) or tag != TAGS[expected]:
            wanted = TAGS[expected] if expected < len(TAGS) else "the end"
            return f"found {tag}, required {wanted}"
        between = text[end:start]
        if expected in (0, 2) and between.strip():
            return f"found text before {tag}"
        if expected == 1 and not blank_think_allowed and not between.strip():
            return "found a blank think block"
        if expected == 3 and not between.strip():
            return "found a blank answer"
        expected, end = expected + 1, start + len(tag)
    if expected < len(TAGS):
        return f"found no {TAGS[expected]}"
    return "found text after </answer>" if text[end:].strip() else ""


def _tags(text: str) -> Iterator[tuple[str, int]]:
    """(tag, position) of each tag, in order; every part of the text is searched once for each tag."""
    nearest = {tag: text.find(tag) for tag in TAGS}
    while found := {tag: position for tag, position in nearest.items() if position >= 0}:
        tag = min(found, key=found.__getitem__)
        yield tag, found[tag]
        nearest[tag] = text.find(tag, found[tag] + 1)


def readable_problem(text: str, *, think_prefilled: bool = False, blank_think_allowed: bool = False) -> str:
    """What breaks the readable format of the cold start (paper, section 2.3.1), or "".

    Well-formed: one `<think>` block at the start, behind it a summary that is not blank, without `<answer>` tags.

    Args:
        text: what the model wrote after the prompt.
        think_prefilled: as in `format_problem`.
        blank_think_allowed: as in `format_problem`.
    """
    opening, closing, *answer = TAGS
    text = (opening + text if think_prefilled else text).strip()
    if not text.startswith(opening):
        return f"found no {opening} at the beginning"
    for tag in (opening, closing):
        if (count := text.count(tag)) != 1:
            return f"found {tag} {count} times, required once"
    if found := next((tag for tag in answer if tag in text), ""):
        return f"found {found}, required a summary without it"
    thoughts, _, summary = text.removeprefix(opening).partition(closing)
    if not thoughts.strip() and not blank_think_allowed:
        return "found a blank think block"
    return "" if summary.strip() else "found no summary behind the thoughts"


def grade_format(completion: str, record: Record, settings: ScorerSettings) -> Grade:
    """Right if the completion is well-formed."""
    find_problem = format_problem if settings.format_rule == "r1_zero" else readable_problem
    problem = find_problem(
        completion, think_prefilled=record.think_prefilled, blank_think_allowed=settings.blank_think_allowed
    )
    return Grade("wrong", problem) if problem else Grade("right", "well-formed")


FORMAT = Rule("format", grade_format, find=find_all, component="format")
