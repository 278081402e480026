"""Texts for supervised training: a prompt and what follows it, from JSONL or Parquet, tokenized and held compactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r1engine.data.questions import Template, render
from r1engine.data.rows import missing, read_rows

if TYPE_CHECKING:
    from tokenizers import Encoding

    from r1engine.hf.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Text:
    """One row of a data file."""

    prompt: str  # as the model is shown it
    completion: str  # what it learns to write, without the end token
    place: str  # "train.jsonl:7", for error messages


def read_texts(path: Path, template: Template) -> list[Text]:
    """All texts of a .jsonl or .parquet file with the fields `question` and `completion`, in file order.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a row is not as above; the row is named.
    """
    texts = []
    for row in read_rows(path, ("question", "completion")):
        for field in ("question", "completion"):
            if field not in row.fields:
                raise ValueError(f"{row.place}: {missing(field, row.columns)}")
            if not isinstance(row.fields[field], str) or not row.fields[field]:
                found = repr(row.fields[field])[:80]
                raise ValueError(f"{row.place}: {field} is {found}, required a text that is not empty")
        texts.append(Text(render(row.fields["question"], template), row.fields["completion"], row.place))
    return texts


class TokenizedTexts:
    """Token ids of many texts in one flat array."""

    def __init__(self, texts: list[Text], tokenizer: PromptTokenizer, *, end_token: int, max_tokens: int) -> None:
        """
        Args:
            texts:      what is trained on.
            tokenizer:  of the model; prompt and completion are tokenized apart.
            end_token:  id behind each completion.
            max_tokens: limit of a text with its end token.

        Raises:
            ValueError: a text is longer than the limit; the first five are named.
        """
        prompts = _encoded([text.prompt for text in texts], tokenizer.encode_batch)
        completions = _encoded([text.completion for text in texts], tokenizer.encode_continuations)
        pairs = [(prompts[text.prompt], completions[text.completion]) for text in texts]
        lengths = [len(prompt) + len(completion) + 1 for prompt, completion in pairs]
        too_long = [f"{t.place} has {n}" for t, n in zip(texts, lengths, strict=True) if n > max_tokens]
        if too_long:
            raise ValueError(
                f"data: {len(too_long)} of {len(texts)} texts are too long ({'; '.join(too_long[:5])} tokens), "
                f"required at most data.max_tokens = {max_tokens}"
            )
        self._ends = np.cumsum([0, *lengths])
        self._prompt_sizes = [len(prompt) for prompt, _ in pairs]
        ids = (token for prompt, completion in pairs for token in (*prompt, *completion, end_token))
        self._tokens = np.fromiter(ids, np.int32, self._ends[-1])

    def __len__(self) -> int:
        return len(self._prompt_sizes)

    def at(self, index: int) -> tuple[list[int], int]:
        """(tokens of a text with its end token, how many of them are the prompt)."""
        start, end = self._ends[index : index + 2].tolist()
        return self._tokens[start:end].tolist(), self._prompt_sizes[index]


def _encoded(texts: list[str], encode: Callable[[list[str]], list[Encoding]]) -> dict[str, list[int]]:
    """Token ids of each distinct text."""
    distinct = list(dict.fromkeys(texts))
    return {text: encoding.ids for text, encoding in zip(distinct, encode(distinct), strict=True)}
