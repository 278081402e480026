"""A model folder as it is trained from: the end of a turn is the end of a completion, for whoever reads it, and the
positions are those of the configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from r1engine.hf.files import read_json

TEMPLATE = "chat_template.jinja"


def prepare(
    source: Path,
    target: Path,
    *,
    end: tuple[str, int] | None = None,
    template: str | None = None,
    max_positions: int | None = None,
    rope_theta: float | None = None,
    also: dict[str, str] | None = None,
) -> None:
    """Write `target`: links to the files of `source`, but for those that are to say something else.

    What is trained from `target` and exported, which copies its files, stops by itself in transformers and SGLang.

    Args:
        source:        Hugging Face folder.
        target:        folder to write; one that an earlier call wrote is replaced.
        end:           the token that ends a turn, and its id; ids that `source` names stay behind it.
        template:      chat template.
        max_positions: longest sequence (tokens).
        rope_theta:    base of the rotary angles.
        also:          name -> text of further files.
        None:          as `source` has it.
    """
    if target.exists():
        shutil.rmtree(target)
    changed: dict[str, str | dict[str, Any]] = _asking(source, end, template) if end is not None else {}
    changed |= also or {}
    if max_positions is not None or rope_theta is not None:
        changed["config.json"] = placed(read_json(source / "config.json"), max_positions, rope_theta)
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in changed:
            (target / file.name).symlink_to(file.resolve())
    for name, content in changed.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")


def placed(config: dict[str, Any], max_positions: int | None, rope_theta: float | None) -> dict[str, Any]:
    """config.json with other positions; the rotary base stands wherever somebody may look for it."""
    if max_positions is not None:
        config = config | {"max_position_embeddings": max_positions}
    if rope_theta is not None:
        config = config | {"rope_theta": rope_theta}
        if config.get("rope_parameters"):
            config["rope_parameters"] = config["rope_parameters"] | {"rope_theta": rope_theta}
    return config


def _asking(source: Path, token: tuple[str, int], template: str | None) -> dict[str, str | dict[str, Any]]:
    """Name -> content of the files that name the end token and the template."""
    end, end_token = token
    settings = _json(source / "tokenizer_config.json") | {"eos_token": end}
    generation = _json(source / "generation_config.json")
    ids = generation.get("eos_token_id", _json(source / "config.json").get("eos_token_id"))
    known = ids if isinstance(ids, list) else [] if ids is None else [ids]
    files: dict[str, str | dict[str, Any]] = {
        "generation_config.json": generation | {"eos_token_id": [end_token, *(i for i in known if i != end_token)]}
    }
    if (source / "special_tokens_map.json").is_file():
        files["special_tokens_map.json"] = _json(source / "special_tokens_map.json") | {"eos_token": end}
    if template is not None:
        settings.pop("chat_template", None)  # one template, in one place
        files[TEMPLATE] = template
    return files | {"tokenizer_config.json": settings}


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
