"""The files of a reward model's folder that differ from those of the language model that it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from r1engine.hf.architecture import (
    FAMILIES,
    SCORE,
    TOKENS,
    Architecture,
    architecture_name,
    checked_architecture,
    read_architecture,
)
from r1engine.hf.files import read_config, read_json
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer, stop_tokens

SETTINGS = "tokenizer_config.json"
# SGLang's class of these has a bias beside the score, at random where the folder has none; transformers' has none.
SERVED_WITH_BIAS = ("Qwen2For", "Qwen3For")
OTHER_HEADS = (SCORE, "ForTokenClassification", "ForProcessRewardModel", "ForRewardModel")  # of models that score


def score_files(source: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> content of config.json and tokenizer_config.json beside a score in place of an output matrix.

    transformers reads the score at the last token that is not the padding. So the padding must be another token than
    the one that ends a text, for the model and for the tokenizer that fills up a batch.

    Args:
        source: folder of the language model, or of a reward model.
        config: its config.json.
    """
    tokenizer = load_tokenizer(source)
    ends = stop_tokens(source, tokenizer)
    settings = read_json(source / SETTINGS) if (source / SETTINGS).is_file() else {}
    named = [config.get("pad_token_id"), _id(tokenizer, settings.get("pad_token"))]
    # Any other token does: the score is read behind the last one that is not it, which is always the end of a text.
    named += [_id(tokenizer, token) for token, is_special in tokenizer.added_tokens.items() if is_special]
    pad = next(token for token in [*named, *range(len(ends) + 1)] if token is not None and token not in ends)
    name = config["architectures"][0].removesuffix(TOKENS).removesuffix(SCORE) + SCORE
    config = {key: 0 if key == "num_nextn_predict_layers" else value for key, value in config.items()}
    config |= {"architectures": [name], "num_labels": 1, "pad_token_id": pad}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if (text := tokenizer.id_to_token(pad)) is not None:
        settings = settings | {"pad_token": text}
    return {"config.json": config, **({SETTINGS: settings} if settings else {})}


def is_served_with_bias(folder: Path) -> bool:
    """Whether a score made of this folder's model is to be written with a bias of 0."""
    return str(architecture_name(read_config(folder / "config.json"))).startswith(SERVED_WITH_BIAS)


def read_trunk(folder: Path) -> Architecture:
    """The architecture of a folder's decoder alone, with a score for its head, whatever head of `OTHER_HEADS` it has.

    Raises:
        ValueError: see `read_architecture`.
    """
    path = folder / "config.json"
    config = read_config(path)
    name = family = str(architecture_name(config))
    for head in OTHER_HEADS:
        family = family.removesuffix(head)
    family = family.removesuffix(TOKENS) + TOKENS
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: architecture {name!r}, required is one of {', '.join(FAMILIES)}, or with another head"
        )
    return checked_architecture(config, family, path).scoring()


def check_reward_model(folder: Path, policy: Architecture) -> None:
    """Refuse what the modules of a policy cannot run.

    Args:
        folder: of the reward model.
        policy: its architecture.

    Raises:
        ValueError: it is no reward model, is of another architecture, or its padding is the token that ends a text.
    """
    found, wanted = read_architecture(folder), policy.scoring()
    if found.head != "score":
        raise ValueError(f"{folder} is a language model, required ...ForSequenceClassification with num_labels 1")
    if replace(found, max_positions=wanted.max_positions) != wanted:
        sizes = [_size(found), _size(wanted)]
        what = (
            f"{sizes[0]}, the policy {sizes[1]}"
            if sizes[0] != sizes[1]
            else f"{sizes[0]}, but other positions or switches"
        )
        raise ValueError(f"{folder} has {what}; required is the policy's architecture: give `urls` of a server instead")
    check_padding(folder)


def _size(arch: Architecture) -> str:
    experts = f" with {arch.moe.num_experts} experts" if arch.moe is not None else ""
    return f"{arch.num_layers} layers of {arch.hidden_size}{experts} and {arch.vocab_size} tokens"


def check_padding(folder: Path) -> None:
    """Refuse a reward model of whose texts transformers and servers would read the token before the last.

    Raises:
        ValueError: the padding is the token that ends a text.
    """
    pad = read_json(folder / "config.json").get("pad_token_id")
    if pad is not None and pad in stop_tokens(folder, load_tokenizer(folder)):
        raise ValueError(
            f"{folder / 'config.json'}: pad_token_id {pad} is the token that ends a response, required is another: "
            "transformers reads the score at the last token that is not it"
        )


def _id(tokenizer: PromptTokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None
