"""Where the steps of a completion end: one rule, over tokens, for labels, training, scores and search.

The paper finds it hard to "explicitly define a fine-grain step in general reasoning" (section 4.2). Here a step ends
at a mark that the model writes. A text is cut between tokens only, so that keys and values of a step can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from r1engine.hf.tokenizer import PromptTokenizer

FIRST_LOOK = 16  # tokens that are decoded first to find a mark; doubled until there is one


class StepMarks:
    """A step ends with the first token after which its own text, without the blanks in front, holds one of `texts`.

    What stands behind a mark in the same token belongs to the step that ends there. A mark with nothing but blanks
    before it ends no step: "a\\n\\n\\n\\nb" has two. What is behind the last mark, such as the answer, is a step.

    Attributes:
        texts:           the marks.
        token_ids:       tokens whose own text holds a whole mark: a generator may stop there, and ask `is_end`.
        may_end:         tokens with the last character of a mark, or a part of it: at others no mark ends.
        max_step_tokens: a step ends after so many tokens without a mark, too; None: only at a mark.
    """

    def __init__(self, tokenizer: PromptTokenizer, texts: Sequence[str], max_tokens: int | None = None) -> None:
        """
        Args:
            tokenizer:  of the completions.
            texts:      the marks, such as a blank line or "</step>".
            max_tokens: a step ends after so many tokens without a mark, too; None: only at a mark.

        Raises:
            ValueError: there is no mark, one has no text, or `max_tokens` is below 1.
        """
        if not texts or not all(texts):
            raise ValueError(f"steps.marks: found {list(texts)!r}, required at least one text, none of them empty")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"steps.max_step_tokens: found {max_tokens}, required at least 1")
        self.texts = tuple(texts)
        self._tokenizer, self.max_step_tokens = tokenizer, max_tokens
        alone = tokenizer.decode_batch([[index] for index in range(tokenizer.num_ids)], skip_special_tokens=False)
        self.token_ids = frozenset(index for index, text in enumerate(alone) if self._holds_mark(text))
        lasts = {mark[-1] for mark in texts} | {"\ufffd"}  # half a character is shown as the latter
        self.may_end = frozenset(index for index, text in enumerate(alone) if lasts & {*text})

    def ends(self, tokens: Sequence[int], stop: frozenset[int]) -> list[int]:
        """Number of tokens up to and with the last one of each step.

        The last step ends before the first stop token, or with the last token. If nothing but blanks is behind the
        last mark, they belong to the step before.

        Args:
            tokens: of a completion, without its prompt.
            stop:   tokens that end a completion; they belong to no step.
        """
        length = next((at for at, token in enumerate(tokens) if token in stop), len(tokens))
        found: list[int] = []
        start = 0
        while start < length:
            end = self._end(tokens[start:length])
            if end is None:
                if found and not self._decode(tokens[start:length]).strip():
                    found.pop()
                end = length - start
            found.append(start := start + end)
        return found

    def is_end(self, step: Sequence[int]) -> bool:
        """Whether a step ends with the last of its tokens, if it did not end before."""
        return self._ends_within(step) or len(step) == self.max_step_tokens

    def _end(self, tokens: Sequence[int]) -> int | None:
        """Tokens of the first step; None: nothing ends it."""
        limit = len(tokens) if self.max_step_tokens is None else min(len(tokens), self.max_step_tokens)
        high = min(FIRST_LOOK, limit)
        while not self._ends_within(tokens[:high]):
            if high == limit:
                return limit if limit == self.max_step_tokens else None
            high = min(2 * high, limit)
        low = 0 if high <= FIRST_LOOK else high // 2  # no mark is in the first `low` tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._ends_within(tokens[:middle]) else (middle, high)
        return high

    def _ends_within(self, tokens: Sequence[int]) -> bool:
        return self._holds_mark(self._decode(tokens).lstrip())

    def _holds_mark(self, text: str) -> bool:
        return any(mark in text for mark in self.texts)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)
