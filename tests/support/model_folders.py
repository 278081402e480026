"""Tiny random Hugging Face folders of every supported family, written by transformers itself."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "num_nextn_predict_layers": 0,
    "rope_parameters": YARN,
    "rms_norm_eps": 1e-5,
}
MOONLIGHT = {
    **DEEPSEEK,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen3-moe": ("Qwen3Moe", QWEN3_MOE),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "moonlight": ("DeepseekV3", MOONLIGHT),
    "deepseek-mtp": ("DeepseekV3", DEEPSEEK | {"num_nextn_predict_layers": 1}),
}


def save_model(folder: Path, family: str, **changes: object) -> torch.nn.Module:
    """Write a random model of `family` with a one-word-one-token tokenizer; returns the transformers model."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | options | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.2)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros, which would hide a swap
                torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(folder)
    if getattr(config, "num_nextn_predict_layers", 0):
        _add_mtp(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    tokenizer.add_special_tokens(["w0", "w1"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def save_scored(folder: Path, family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Write a random model that scores steps, as exported; returns the transformers model and the score's weight."""
    from r1engine.search.scored_folder import NAME, ScoredFolder

    model = save_model(folder, family)
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"}
    weights["score.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    architecture = f"{FAMILIES[family][0]}ForSequenceClassification"
    config |= {"architectures": [architecture], "num_labels": 1, "id2label": {"0": "x"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / NAME).write_text(ScoredFolder(("w9",), None, "correctness").to_text())
    return model, weights["score.weight"]


def _add_mtp(folder: Path) -> None:
    """The MTP modules, which transformers does not write; they share embedding and output matrix, as DeepSeek's do."""
    from r1engine.hf.architecture import read_architecture
    from r1engine.hf.tensors import mtp_copies, mtp_shapes

    tensors, arch = load_file(folder / "model.safetensors"), read_architecture(folder)
    random = torch.Generator().manual_seed(1)
    for name, shape in mtp_shapes(arch).items():
        tensors[name] = 0.2 * torch.randn(shape, generator=random) + (0.5 if len(shape) == 1 else 0.0)
    for name, copies in mtp_copies(arch).items():
        tensors |= {copy: tensors[name].clone() for copy in copies}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
