"""Tiny random Hugging Face folders of every supported family, written by transformers itself."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
}


def save_model(folder: Path, family: str, **changes: object) -> torch.nn.Module:
    """Write a random model of `family` with a one-word-one-token tokenizer; returns the transformers model."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | options | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros, which would hide a swap
                torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer.add_special_tokens(["w0", "w1"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
