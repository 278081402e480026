"""Which Hugging Face architectures are supported, and what their config.json means to Megatron-core.

A family is Qwen2/Qwen2.5, Qwen3 or Llama-3: grouped-query attention, SwiGLU, RMSNorm, rotary embeddings.
Imports no Megatron, so that a wrong folder is refused at once. DeepSeek-V3 will be a second shape beside `Dense`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class Dense:
    """The shape of a dense decoder, read from a Hugging Face config.json."""

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # the llama3 fields, or None for plain rotary embeddings
    is_tied: bool  # lm_head.weight is embed_tokens.weight
    has_qkv_bias: bool
    has_qk_norm: bool


def read_config(folder: Path) -> Dense:
    """Read the shape of the model in a local Hugging Face folder.

    Raises:
        ValueError: the folder, its config.json or its tokenizer is missing, or the model is not supported.
    """
    if not folder.is_dir():
        raise ValueError(f"model.path: {folder} is not a folder; a local Hugging Face folder is required")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"model.path: {folder} has no {name}; a Hugging Face folder with it is required")
    raw = json.loads((folder / "config.json").read_text())
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model.path: {folder} holds {architecture}; supported are {', '.join(ARCHITECTURES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"model.path: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    if raw.get("use_sliding_window"):
        raise ValueError("model.path: use_sliding_window is true; only full attention is supported")
    if architecture != "Qwen2ForCausalLM" and (raw.get("attention_bias") or raw.get("mlp_bias")):
        raise ValueError(f"model.path: {architecture} with attention_bias or mlp_bias is not supported")
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    return Dense(
        architecture=architecture,
        hidden_size=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        max_positions=raw.get("max_position_embeddings", 32_768),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        is_tied=bool(raw.get("tie_word_embeddings", False)),
        has_qkv_bias=architecture == "Qwen2ForCausalLM",
        has_qk_norm=architecture == "Qwen3ForCausalLM",
    )


def _rope(raw: dict) -> tuple[float, dict | None]:
    """(theta, llama3 scaling or None) of either spelling: `rope_parameters` (transformers 5) or the older keys."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"model.path: rope_type {kind!r} is not supported; 'default' and 'llama3' are")
    return theta, (rope if kind == "llama3" else None)


def inverse_frequencies(model: Dense) -> torch.Tensor:
    """[head_dim / 2] float32, rotary frequencies (rad/token), with Llama-3's long-context scaling."""
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequency = 1.0 / model.rope_theta**exponent
    if model.rope_scaling is None:
        return frequency
    low, high = model.rope_scaling["low_freq_factor"], model.rope_scaling["high_freq_factor"]
    original = model.rope_scaling["original_max_position_embeddings"]
    factor = model.rope_scaling["factor"]
    turns = original * frequency / (2 * math.pi)  # full turns within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (smooth + (1 - smooth) / factor)


def check_layout(model: Dense, tensor: int, pipeline: int) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        ValueError: naming the size, the dimension and both numbers.
    """
    sizes = {
        "attention heads": model.heads,
        "key-value heads": model.kv_heads,
        "intermediate size": model.intermediate_size,
        "vocabulary": model.vocab_size,
    }
    for what, size in sizes.items():
        if size % tensor:
            raise ValueError(f"parallel.tensor: {tensor} does not divide the model's {what} ({size})")
    if model.layers % pipeline:
        raise ValueError(f"parallel.pipeline: {pipeline} does not divide the model's {model.layers} layers")
