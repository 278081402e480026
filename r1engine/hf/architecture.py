"""What config.json of a local Hugging Face folder says about its model, checked; without PyTorch.

Qwen2, Qwen3 and Llama 3 are one computation with three switches: a bias on q/k/v, a norm of each query and key head,
and how the rotary frequencies are scaled. Qwen3-MoE replaces the MLP by routed experts. DeepSeek-V3 (and Moonlight and
Kimi-K2, which carry its name) has multi-head latent attention, routed and shared experts. Each of them may end in a
score in place of an output matrix: a reward model, which transformers calls ...ForSequenceClassification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from r1engine.config import Model
from r1engine.hf.files import read_config

DENSE = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
FAMILIES = (*DENSE, "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM")
TOKENS, SCORE = "ForCausalLM", "ForSequenceClassification"  # what transformers calls the two heads
Head = Literal["tokens", "score"]  # what stands on the last hidden state: the output matrix, or one number a token


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the long rotary wavelengths; wavelengths and context are in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: wavelengths stretched by how often they turn within the original context."""

    factor: float
    original_context: int  # tokens
    beta_fast: float  # pairs that turn more often than this within the original context keep their frequency
    beta_slow: float  # pairs that turn less often are divided by `factor`
    is_rounded: bool  # the ramp between the two begins and ends at a whole pair
    magnitude: float  # factor on the rotated part of queries and keys
    softmax_factor: float  # on the attention scores


@dataclass(frozen=True)
class LinearScaling:
    """Every wavelength stretched by the same factor (position interpolation)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A stretch that begins beyond the context: up to there, as far as this engine goes, there is none.

    Beyond it the angles depend on the length of the whole sequence, so that no cache of keys holds what a trainer
    computes from the finished sequence.
    """

    factor: float


RopeScaling = Llama3Scaling | YarnScaling | LinearScaling | DynamicScaling


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V3, section 2.1.1): queries and keys/values come out of small latents."""

    query_rank: int | None  # size of the query latent; None: queries come from the hidden state directly
    kv_rank: int  # size of the latent that keys and values share
    nope_dim: int  # dimensions of a query or key head without position
    rope_dim: int  # and with; the key's are shared by all heads
    value_dim: int
    norm_eps: float = 1e-6  # of the latents' norms; transformers fixes it, whatever rms_norm_eps is


@dataclass(frozen=True)
class Moe:
    """Mixture of experts (DeepSeek-V3, section 2.1.2)."""

    num_experts: int
    top_k: int
    intermediate_size: int  # of one routed expert
    shared_size: int  # intermediate size of the shared experts together; 0: none
    layers: tuple[bool, ...]  # which layers have experts
    score: Literal["softmax", "sigmoid"]
    is_normalized: bool  # the weights of the chosen experts sum to `scale`
    has_bias: bool  # a bias that takes part in the choice of experts, not in their weights
    num_groups: int  # experts are chosen in `group_top_k` of this many groups; 1: no groups
    group_top_k: int
    scale: float

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return sum(self.layers)


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    has_qkv_bias: bool
    has_output_bias: bool  # bias of o_proj
    has_qk_norm: bool
    is_tied: bool  # the output matrix is the embedding
    mla: Mla | None = None
    moe: Moe | None = None
    num_mtp_layers: int = 0  # multi-token prediction modules, behind the last layer
    head: Head = "tokens"

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.mla.rope_dim if self.mla else self.head_dim

    @property
    def rope_magnitude(self) -> float:
        """Factor on the rotated dimensions."""
        return self.rope_scaling.magnitude if isinstance(self.rope_scaling, YarnScaling) else 1.0

    @property
    def softmax_scale(self) -> float:
        """Factor on the product of a query and a key."""
        factor = self.rope_scaling.softmax_factor if isinstance(self.rope_scaling, YarnScaling) else 1.0
        return factor * self.head_dim**-0.5

    def scoring(self) -> Architecture:
        """The same decoder with a score for its head: no output matrix, and no modules that predict further tokens."""
        return replace(self, head="score", is_tied=False, num_mtp_layers=0)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) has routed experts in place of the MLP. MTP modules, behind the last layer, do."""
        return self.moe is not None and (layer >= self.num_layers or self.moe.layers[layer])


def read_architecture(folder: Path) -> Architecture:
    """Reads and checks `folder`/config.json.

    Raises:
        ValueError: the file is missing or incomplete, or asks for something that is not computed here.
    """
    path = folder / "config.json"
    config = read_config(path)
    name = architecture_name(config)
    family = f"{name}".removesuffix(SCORE) + TOKENS if f"{name}".endswith(SCORE) else name
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: architecture {name!r}, required is one of {', '.join(FAMILIES)}, or as a reward model ...{SCORE}"
        )
    arch = checked_architecture(config, family, path)
    if family == name:
        return arch
    if (labels := _num_labels(config)) != 1:
        raise ValueError(f"{path}: {name} has {labels} labels, required is 1, the score (num_labels 1)")
    return arch.scoring()


def architecture_name(config: dict[str, Any]) -> Any:
    """What transformers calls the model, None if it is not said."""
    return (config.get("architectures") or [None])[0]


def checked_architecture(config: dict[str, Any], family: str, path: Path) -> Architecture:
    """The architecture of one of `FAMILIES` with these settings; errors as of `read_architecture`."""
    _refuse_unsupported(config, path)
    try:
        arch = _architecture(config, family, path)
    except KeyError as error:
        raise ValueError(f"{path}: key {error} is missing, required by {family}") from error
    if arch.num_heads % arch.num_kv_heads or arch.rope_dim % 2:
        found = f"{arch.num_heads} heads, {arch.num_kv_heads} key/value heads, {arch.rope_dim} rotated dimensions"
        raise ValueError(f"{path}: {found}; heads must be a multiple of key/value heads, the dimensions even")
    if arch.moe is not None and arch.moe.top_k > arch.moe.num_experts:
        raise ValueError(f"{path}: num_experts_per_tok is {arch.moe.top_k}, required <= {arch.moe.num_experts} experts")
    return arch


def _num_labels(config: dict[str, Any]) -> int:
    """As transformers counts them: two where nothing is said."""
    return config.get("num_labels") or len(config.get("id2label") or (0, 1))


def architecture_of(model: Model) -> Architecture:
    """What is trained: the folder's architecture, with the positions and the rotary base of the configuration.

    Raises:
        ValueError: see `read_architecture`; or these are set where a rule stretches the folder's context.
    """
    arch = read_architecture(model.folder)
    positions = arch.max_positions if model.max_positions is None else model.max_positions
    theta = arch.rope_theta if model.rope_theta is None else model.rope_theta
    placed = replace(arch, max_positions=positions, rope_theta=theta)
    if placed != arch and arch.rope_scaling is not None:
        key, found = ("rope_theta", theta) if positions == arch.max_positions else ("max_positions", positions)
        raise ValueError(
            f"model.{key}: found {found:g}, required null: the rope_scaling in {model.folder / 'config.json'} says how "
            "far its context goes"
        )
    return placed


def is_fp8_folder(folder: Path) -> bool:
    """Whether the matrices are in FP8: config.json says so, and `hf/folder.py` refuses tensors that are otherwise."""
    return quantization(folder).get("quant_method") == "fp8"


def quantization(folder: Path) -> dict[str, Any]:
    """`quantization_config` of config.json; empty where there is none."""
    return read_config(folder / "config.json").get("quantization_config", {})


def _architecture(config: dict[str, Any], family: str, path: Path) -> Architecture:
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    mla = _mla(config, path) if family == "DeepseekV3ForCausalLM" else None
    scaling = _rope_scaling(config, path, is_latent=mla is not None)
    moe = {"DeepseekV3ForCausalLM": _deepseek_moe, "Qwen3MoeForCausalLM": _qwen3_moe}.get(family)
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=mla.nope_dim + mla.rope_dim
        if mla
        else config.get("head_dim") or _default_head_dim(family, hidden_size, num_heads),
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=_context(config, scaling),
        norm_eps=config["rms_norm_eps"],
        rope_theta=_rope(config).get("rope_theta", 10_000.0),
        rope_scaling=scaling,
        has_qkv_bias=family == "Qwen2ForCausalLM" or config.get("attention_bias", False),
        has_output_bias=family != "Qwen2ForCausalLM" and config.get("attention_bias", False),
        has_qk_norm=family in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        is_tied=config.get("tie_word_embeddings", False),
        mla=mla,
        moe=moe(config, path) if moe else None,
        num_mtp_layers=config.get("num_nextn_predict_layers") or 0,
    )


def _mla(config: dict[str, Any], path: Path) -> Mla:
    if config.get("rope_interleave") is False:
        raise ValueError(f"{path}: rope_interleave is false, required is a rotation of neighbouring dimensions")
    if config.get("attention_bias"):
        raise ValueError(f"{path}: attention_bias is true, required is latent attention without bias")
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        raise ValueError(
            f"{path}: num_key_value_heads is {config['num_key_value_heads']}, required is num_attention_heads = "
            f"{config['num_attention_heads']} (every head has its own keys and values in latent attention)"
        )
    return Mla(
        query_rank=config.get("q_lora_rank"),
        kv_rank=config["kv_lora_rank"],
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
    )


def _deepseek_moe(config: dict[str, Any], path: Path) -> Moe:
    num_layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    required = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
    for key, value in required.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {config[key]!r}, required is {value!r}")
    moe = Moe(
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        shared_size=config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        layers=tuple(layer >= dense for layer in range(num_layers)),
        score="sigmoid",
        is_normalized=True,
        has_bias=True,
        num_groups=config.get("n_group") or 1,
        group_top_k=config.get("topk_group") or 1,
        scale=config["routed_scaling_factor"],
    )
    if moe.num_groups > 1 and moe.top_k != 2 * moe.group_top_k:
        # A group's score is the sum of its two best experts here; Megatron sums its num_experts_per_tok / topk_group.
        raise ValueError(
            f"{path}: num_experts_per_tok is {moe.top_k}, required is twice topk_group, {2 * moe.group_top_k}"
        )
    return moe


def _qwen3_moe(config: dict[str, Any], path: Path) -> Moe:
    num_layers, every = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    return Moe(
        num_experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        shared_size=0,
        layers=tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(num_layers)),
        score="softmax",
        is_normalized=config.get("norm_topk_prob", False),
        has_bias=False,
        num_groups=1,
        group_top_k=1,
        scale=1.0,
    )


def _default_head_dim(family: str, hidden_size: int, num_heads: int) -> int:
    """Qwen3 configurations without head_dim mean 128, whatever the hidden size."""
    return 128 if family == "Qwen3ForCausalLM" else hidden_size // num_heads


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, from either place: rope_parameters, or rope_theta beside rope_scaling."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    return rope


def _rope_scaling(config: dict[str, Any], path: Path, *, is_latent: bool) -> RopeScaling | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise ValueError(f"{path}: rope_type {kind!r}, required is 'default', 'linear', 'dynamic', 'yarn' or 'llama3'")
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = original or config["max_position_embeddings"]
    factor = rope["factor"] if kind != "yarn" else rope.get("factor") or config["max_position_embeddings"] / original
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise ValueError(f"{path}: the factor of rope_type {kind!r} is {factor!r}, required is a number of at least 1")
    if kind == "yarn":
        return _yarn(rope, factor, original, is_latent=is_latent)
    if kind != "llama3":
        return LinearScaling(factor) if kind == "linear" else DynamicScaling(factor)
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=original,
    )


def _yarn(rope: dict[str, Any], factor: float, original: int, *, is_latent: bool) -> YarnScaling:
    """As transformers reads it, but for `attn_factor`, which transformers passes over: vLLM and SGLang multiply the
    magnitude by it, and DeepSeek-R1-0528-Qwen3-8B was published with one that makes the magnitude 1."""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if is_latent:  # DeepSeek's own code: either may stand alone
        magnitude = _mscale(factor, mscale or 1.0) / _mscale(factor, all_dim or 0.0)
    else:
        magnitude = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    magnitude *= rope.get("attn_factor") or 1.0
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        is_rounded=rope.get("truncate", True),
        magnitude=magnitude if rope.get("attention_factor") is None else rope["attention_factor"],
        softmax_factor=_mscale(factor, all_dim) ** 2 if is_latent and all_dim else 1.0,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _context(config: dict[str, Any], scaling: RopeScaling | None) -> int:
    """The longest sequence (tokens), as SGLang has it: max_position_embeddings may be that of before the stretch."""
    longest = config["max_position_embeddings"]
    if isinstance(scaling, LinearScaling):
        return int(longest * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return max(longest, int(scaling.original_context * scaling.factor))
    return longest


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    if config.get("use_sliding_window"):
        raise ValueError(f"{path}: use_sliding_window is true, required is full attention in every layer")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {config['hidden_act']!r}, required is 'silu'")
    if config.get("mlp_bias"):
        raise ValueError(f"{path}: mlp_bias is true, required is an MLP without bias")
    if _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not 1, required is a rotation of the whole head")
