"""The format rule: `<think> ... </think>` once, then `<answer> ... </answer>` once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_problem(text: str, *, think_prefilled: bool = False) -> str:
    """What breaks the format, or "" for a well-formed completion.

    Well-formed: the four tags `<think> </think> <answer> </answer>`, each exactly once and in this order, nothing
    but white space before, between and after the two blocks, and an answer that is not blank. The think block must
    be there but may be empty: the rule asks where the reasoning stands, not how much there is.

    Args:
        text: what the model wrote after the prompt.
        think_prefilled: the prompt itself ended with `<think>`, so the text starts inside the block; a second
            `<think>` is then one too many.
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
        if expected == 3 and not between.strip():
            return "found a blank answer"
        expected, end = expected + 1, start + len(tag)
    if expected < len(TAGS):
        return f"found no {TAGS[expected]}"
    return "found text after </answer>" if text[end:].strip() else ""


def _tags(text: str) -> Iterator[tuple[str, int]]:
    """(tag, position) of each tag, in order; one pass, as a tag starts at every "<" or not at all."""
    start = text.find("<")
    while start >= 0:
        for tag in TAGS:
            if text.startswith(tag, start):
                yield tag, start
        start = text.find("<", start + 1)
