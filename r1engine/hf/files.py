"""Reads the JSON files of a Hugging Face folder. What is wrong with one is told in a line that begins with its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LFS_POINTER = "version https://git-lfs"

# What keys of config.json hold, where they are there and not null. Keys that nobody here reads may hold anything.
SIZES = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank",
    "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "decoder_sparse_step",
}  # fmt: skip
COUNTS = {
    "num_key_value_heads", "head_dim", "original_max_position_embeddings", "num_experts", "num_local_experts",
    "n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers",
}  # fmt: skip
NUMBERS = {"rms_norm_eps", "rope_theta", "routed_scaling_factor"}
FLAGS = {"attention_bias", "tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "mlp_bias", "rope_interleave"}
MAPPINGS = {"rope_scaling", "rope_parameters", "quantization_config"}
LISTS = {"architectures": str, "mlp_only_layers": int}
ROPE_NUMBERS = {
    "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "attn_factor", "attention_factor",
}  # fmt: skip


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: there is no such file, it cannot be read, is no UTF-8, or is what Git LFS leaves in its place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path}: no such file; required is a Hugging Face model folder") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); copy it again") from error
    if text.startswith(LFS_POINTER):
        raise ValueError(f"{path}: found a Git LFS pointer, required is the file itself: run `git lfs pull` there")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: see `read_text`; or the text is cut off, is not JSON or is no object.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; copy it again") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply, required is a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {value!r:.40}, required is a JSON object")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds, without what is null: there null means absent.

    Raises:
        ValueError: see `read_json`; or a key that is read here holds something else than it should.
    """
    config = {key: value for key, value in read_json(path).items() if value is not None}
    for key, value in config.items():
        if required := _required(key, value):
            raise ValueError(f"{path}: {key} is {value!r:.60}, required is {required}")
    for section in ("rope_scaling", "rope_parameters"):
        for key, value in config.get(section, {}).items():
            if key in ROPE_NUMBERS and value is not None and not is_number(value):
                raise ValueError(f"{path}: {section}.{key} is {value!r:.60}, required is a number")
    return config


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a JSON value is a whole number from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _required(key: str, value: Any) -> str:
    """What a key should hold that holds something else; "" where all is well."""
    if key in SIZES and not is_count(value, 1):
        return "a whole number of at least 1"
    if key in COUNTS and not is_count(value):
        return "a whole number of at least 0"
    if key in NUMBERS and not (is_number(value) and value > 0):
        return "a number above 0"
    if key in FLAGS and not isinstance(value, bool):
        return "true or false"
    if key in MAPPINGS and not isinstance(value, dict):
        return "an object"
    if key in LISTS and not (isinstance(value, list) and all(isinstance(item, LISTS[key]) for item in value)):
        return "a list of " + ("names" if LISTS[key] is str else "whole numbers")
    return ""
