"""The tokenizer of a local Hugging Face folder, and the tokens that end a completion."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import Encoding, Tokenizer

from r1engine.hf.files import is_count, read_json, read_text

OTHERS = ("*tiktoken*", "*.model", "vocab.*")  # files of tokenizers that are not read here


class PromptTokenizer:
    """A tokenizer whose tokens are the whole text and nothing else, but for what the model expects in front of it.

    A tokenizer.json may hold more than the tokenizer: the truncation, padding and special tokens of the task that it
    was last saved for. Here a text is neither cut nor padded, as transformers does it. What is added in front (BOS) is
    there once, also if the text begins with it, as a rendered chat does. What is added behind (EOS) is left out: a
    prompt goes on.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes over `tokenizer` and changes its settings."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._front = tokenizer.encode("")
        text = tokenizer.encode("a", add_special_tokens=False).ids
        added = tokenizer.encode("a").ids
        # What is added to "a" stands around its tokens, and is added to the empty text alike.
        at = next((i for i in range(len(added)) if added[i : i + len(text)] == text), 0)
        self._front.truncate(at)

    def encode(self, text: str) -> Encoding:
        """The tokens of a text, `ids` among them."""
        return self._fronted(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: list[str]) -> list[Encoding]:
        """As `encode`, on all cores."""
        return [self._fronted(one) for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_continuations(self, texts: list[str]) -> list[Encoding]:
        """The tokens of texts that stand behind others: nothing is put in front."""
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_batch(self, sequences: list[list[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """As `decode`, on all cores."""
        return self._tokenizer.decode_batch(sequences, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """The token with an id, None if there is no such id."""
        return self._tokenizer.id_to_token(index)

    @property
    def num_ids(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def front(self) -> str:
        """The text of what is put in front of every text, "" for nothing."""
        return self._tokenizer.decode(self._front.ids, skip_special_tokens=False) if self._front.ids else ""

    @property
    def added_tokens(self) -> dict[str, bool]:
        """Text of each added token, and whether it is a special one: they are found in any text before it is split."""
        return {token.content: token.special for token in self._tokenizer.get_added_tokens_decoder().values()}

    def normalize(self, text: str) -> str:
        """The text in which added tokens are looked for, beside the text itself."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _fronted(self, encoding: Encoding) -> Encoding:
        front = self._front.ids
        if not front or encoding.ids[: len(front)] == front:
            return encoding
        return Encoding.merge([self._front, encoding])


def load_tokenizer(folder: Path) -> PromptTokenizer:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is no tokenizer.json (if the folder has another kind: what makes one of it), or it cannot be
            read.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        text = read_text(path)
        try:
            return PromptTokenizer(Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"{path}: cannot be read by tokenizers {tokenizers.__version__}: {str(error)[:200]}; copy the file "
                "again, or install the version that wrote it"
            ) from error
    message = f"{path}: no such file; required to encode prompts and decode completions"
    if others := sorted(file.name for kind in OTHERS for file in folder.glob(kind)):
        message += f". The folder has {others[0]}: docs/models.md has the lines that make tokenizer.json of it"
    raise ValueError(message)


def stop_tokens(folder: Path, tokenizer: PromptTokenizer) -> frozenset[int]:
    """Every end-of-sequence id that a folder names: at each of them a completion ends.

    Raises:
        ValueError: there is none, so no completion could end.
    """
    return frozenset(_end_tokens(folder, tokenizer))


def end_token(folder: Path, tokenizer: PromptTokenizer) -> int:
    """The id that ends a text that the model learns to write: the first one that the folder names.

    Raises:
        ValueError: there is none.
    """
    return _end_tokens(folder, tokenizer)[0]


def _end_tokens(folder: Path, tokenizer: PromptTokenizer) -> list[int]:
    """Of tokenizer_config.json (eos_token), then of generation_config.json and config.json (eos_token_id)."""
    ends: list[int] = []
    path = folder / "tokenizer_config.json"
    if path.exists():
        token = read_json(path).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str | None):
            raise ValueError(f"{path}: eos_token is {text!r:.60}, required is a text")
        if text is not None:
            index = tokenizer.token_to_id(text)
            if index is None:
                raise ValueError(f"{path}: eos_token {text!r} is not in tokenizer.json")
            ends.append(index)
    for path in (folder / "generation_config.json", folder / "config.json"):
        if path.exists():
            found = read_json(path).get("eos_token_id")
            ids = found if isinstance(found, list) else [] if found is None else [found]
            if not all(is_count(index) for index in ids):
                raise ValueError(f"{path}: eos_token_id is {found!r:.60}, required is a token id or a list of them")
            ends += ids
    if not ends:
        raise ValueError(f"{folder}: no eos_token_id in generation_config.json or config.json, required is one")
    return ends
