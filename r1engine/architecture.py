"""What a local Hugging Face folder says about its model and tokenizer, checked; for the trainer and the generator.

Qwen2ForCausalLM, Qwen3ForCausalLM and LlamaForCausalLM are one computation with three switches: a bias on
q/k/v, a norm of each query and key head, and how the rotary frequencies are scaled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

FAMILIES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the long rotary wavelengths; wavelengths and context are in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    has_qkv_bias: bool
    has_output_bias: bool  # bias of o_proj
    has_qk_norm: bool
    is_tied: bool  # the output matrix is the embedding


def read_architecture(folder: Path) -> Architecture:
    """Reads and checks `folder`/config.json.

    Raises:
        ValueError: the file is missing or incomplete, or asks for something that is not computed here.
    """
    path = folder / "config.json"
    config = read_json(path)
    family = (config.get("architectures") or [None])[0]
    if family not in FAMILIES:
        raise ValueError(f"{path}: architecture {family!r}, required is one of {', '.join(FAMILIES)}")
    _refuse_unsupported(config, path)
    try:
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        arch = Architecture(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or _default_head_dim(family, hidden_size, num_heads),
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=_rope(config).get("rope_theta", 10_000.0),
            rope_scaling=_rope_scaling(config, path),
            has_qkv_bias=family == "Qwen2ForCausalLM" or config.get("attention_bias", False),
            has_output_bias=family != "Qwen2ForCausalLM" and config.get("attention_bias", False),
            has_qk_norm=family == "Qwen3ForCausalLM",
            is_tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing, required by {family}") from error
    if arch.num_heads % arch.num_kv_heads or arch.head_dim % 2:
        found = f"{arch.num_heads} heads, {arch.num_kv_heads} key/value heads, head_dim {arch.head_dim}"
        raise ValueError(f"{path}: {found}; heads must be a multiple of key/value heads, head_dim even")
    return arch


def rotary_frequencies(arch: Architecture) -> torch.Tensor:
    """Angle per token of each rotated pair: theta^(-2i / head_dim), the long wavelengths stretched under llama3.

    Returns:
        [head_dim / 2] float32 (radians per token), on the CPU.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / arch.rope_theta**exponents
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1: short wavelengths keep their frequency; 0: long ones are divided by factor; a ramp between the two.
    kept = scaling.original_context / wavelengths - scaling.low_freq_factor
    kept = (kept / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; required to encode prompts and decode completions")
    return Tokenizer.from_file(str(path))


def check_layout(arch: Architecture, *, tensor: int, pipeline: int) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        ValueError: naming the size, what it does not divide, and both numbers.
    """
    sizes = {
        "attention heads": arch.num_heads,
        "key/value heads": arch.num_kv_heads,
        "intermediate size": arch.intermediate_size,
        "vocabulary": arch.vocab_size,
    }
    for what, size in sizes.items():
        if size % tensor:
            raise ValueError(f"parallel.tensor: {tensor} does not divide the model's {what} ({size})")
    if arch.num_layers % pipeline:
        raise ValueError(f"parallel.pipeline: {pipeline} does not divide the model's {arch.num_layers} layers")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if there is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; required is a Hugging Face model folder")
    return json.loads(path.read_text(encoding="utf-8"))


def _default_head_dim(family: str, hidden_size: int, num_heads: int) -> int:
    """Qwen3 configurations without head_dim mean 128, whatever the hidden size."""
    return 128 if family == "Qwen3ForCausalLM" else hidden_size // num_heads


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, from either place: rope_parameters, or rope_theta beside rope_scaling."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    return rope


def _rope_scaling(config: dict[str, Any], path: Path) -> Llama3Scaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{path}: rope_type {kind!r}, required is 'default' or 'llama3'")
    return Llama3Scaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    if config.get("use_sliding_window"):
        raise ValueError(f"{path}: use_sliding_window is true, required is full attention in every layer")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {config['hidden_act']!r}, required is 'silu'")
    if config.get("mlp_bias"):
        raise ValueError(f"{path}: mlp_bias is true, required is an MLP without bias")
    if _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not 1, required is a rotation of the whole head")
