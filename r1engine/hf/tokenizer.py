"""The tokenizer of a local Hugging Face folder, and the tokens that end a completion."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from r1engine.hf.architecture import read_json


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; required to encode prompts and decode completions")
    return Tokenizer.from_file(str(path))


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Every end-of-sequence id that generation_config.json, config.json or tokenizer_config.json of a folder name.

    Raises:
        ValueError: there is none, so no completion could end.
    """
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = read_json(folder / name).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if (folder / "tokenizer_config.json").is_file():
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        text = token["content"] if isinstance(token, dict) else token
        if text is not None:
            index = tokenizer.token_to_id(text)
            if index is None:
                raise ValueError(f"{folder / 'tokenizer_config.json'}: eos_token {text!r} is not in tokenizer.json")
            stops.add(index)
    if not stops:
        raise ValueError(f"{folder}: no eos_token_id in generation_config.json or config.json, required is one")
    return frozenset(stops)
