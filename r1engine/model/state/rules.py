"""Hugging Face names <-> Megatron parameters: one rule a parameter, exact in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1engine.hf.architecture import Architecture


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors, and these of it.

    A rank's parameter is `fuse` of its slices of the Hugging Face tensors; `unfuse` gives the slices back.
    """

    hf: tuple[str, ...]
    dim: int | None = None  # the dimension of each HF tensor that is split evenly over ranks; None: every rank has all
    fuse: Callable[[list[torch.Tensor]], torch.Tensor] = lambda slices: slices[0]
    unfuse: Callable[[torch.Tensor], list[torch.Tensor]] = lambda parameter: [parameter]
    expert: int | None = None  # the routed expert that it belongs to
    is_float32: bool = False  # kept in float32 whatever the model's dtype

    def slice_of(self, size: int, rank: int, ranks: int) -> slice:
        """The part of dimension `dim` (of `size`) that a rank has; the last ones have less where it is padded."""
        per_rank = -(-size // ranks)
        return slice(min(rank * per_rank, size), min((rank + 1) * per_rank, size))


def _gate_up(prefix: str, expert: int | None = None) -> Rule:
    """Each rank holds its part of gate, then its part of up: the halves are split, never the whole."""
    names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    return Rule(names, 0, torch.cat, lambda parameter: list(parameter.chunk(2)), expert)


def _qkv(prefix: str, kind: str, model: Architecture) -> Rule:
    """Megatron keeps, for every key-value head, its query heads, its key and its value together."""
    per_group, head = model.num_heads // model.num_kv_heads, model.head_dim

    def fuse(slices: list[torch.Tensor]) -> torch.Tensor:
        groups, rest = slices[1].shape[0] // head, slices[0].shape[1:]
        return torch.cat([t.reshape(groups, -1, *rest) for t in slices], dim=1).reshape(-1, *rest)

    def unfuse(parameter: torch.Tensor) -> list[torch.Tensor]:
        rest = parameter.shape[1:]
        parts = parameter.view(-1, (per_group + 2) * head, *rest).split([per_group * head, head, head], dim=1)
        return [p.reshape(-1, *rest) for p in parts]

    return Rule(tuple(f"{prefix}.{x}_proj.{kind}" for x in "qkv"), 0, fuse, unfuse)


def rules(model: Architecture) -> dict[str, Rule]:
    """Megatron parameter name -> Rule for the whole model, with global layer and expert numbers, in HF order."""
    table = {"embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), 0)}
    for i in range(model.num_layers):
        table |= _layer(model, i, f"decoder.layers.{i}", f"model.layers.{i}")
    table["decoder.final_layernorm.weight"] = Rule(("model.norm.weight",))
    if not model.is_tied:
        table["output_layer.weight"] = Rule(("lm_head.weight",), 0)
    return table


def mtp_rules(model: Architecture) -> dict[str, Rule]:
    """The same for the MTP modules, without their copies of embedding and output matrix."""
    table: dict[str, Rule] = {}
    for depth in range(model.num_mtp_layers):
        layer = model.num_layers + depth
        ours, hf = f"drafts.{depth}", f"model.layers.{layer}"
        table |= {f"{ours}.{name}.weight": Rule((f"{hf}.{name}.weight",)) for name in ("enorm", "hnorm")}
        table[f"{ours}.eh_proj.weight"] = Rule((f"{hf}.eh_proj.weight",), 0)
        table |= _layer(model, layer, f"{ours}.layer", hf)
        table[f"{ours}.norm.weight"] = Rule((f"{hf}.shared_head.norm.weight",))
    return table


def mtp_copies(model: Architecture) -> dict[str, list[str]]:
    """Name of a matrix of the main model -> names of its copies in the MTP modules."""
    behind = range(model.num_layers, model.num_layers + model.num_mtp_layers)
    return {
        "model.embed_tokens.weight": [f"model.layers.{i}.embed_tokens.weight" for i in behind],
        "lm_head.weight": [f"model.layers.{i}.shared_head.head.weight" for i in behind],
    }


def _layer(model: Architecture, layer: int, ours: str, hf: str) -> dict[str, Rule]:
    table = {f"{ours}.input_layernorm.weight": Rule((f"{hf}.input_layernorm.weight",))}
    table |= (_latent_attention if model.mla else _attention)(model, f"{ours}.self_attention", f"{hf}.self_attn")
    table[f"{ours}.self_attention.linear_proj.weight"] = Rule((f"{hf}.self_attn.o_proj.weight",), 1)
    table[f"{ours}.pre_mlp_layernorm.weight"] = Rule((f"{hf}.post_attention_layernorm.weight",))
    if model.has_experts(layer):
        return table | _experts(model, f"{ours}.mlp", f"{hf}.mlp")
    return table | _mlp(f"{ours}.mlp", f"{hf}.mlp")


def _attention(model: Architecture, ours: str, hf: str) -> dict[str, Rule]:
    table = {f"{ours}.linear_qkv.weight": _qkv(hf, "weight", model)}
    if model.has_qkv_bias:
        table[f"{ours}.linear_qkv.bias"] = _qkv(hf, "bias", model)
    if model.has_qk_norm:
        table |= {f"{ours}.{x}_layernorm.weight": Rule((f"{hf}.{x}_norm.weight",)) for x in "qk"}
    return table


def _latent_attention(model: Architecture, ours: str, hf: str) -> dict[str, Rule]:
    assert model.mla is not None
    if model.mla.query_rank is None:
        table = {f"{ours}.linear_q_proj.weight": Rule((f"{hf}.q_proj.weight",), 0)}
    else:
        table = {
            f"{ours}.linear_q_down_proj.weight": Rule((f"{hf}.q_a_proj.weight",), 0),
            f"{ours}.q_layernorm.weight": Rule((f"{hf}.q_a_layernorm.weight",)),
            f"{ours}.linear_q_up_proj.weight": Rule((f"{hf}.q_b_proj.weight",), 0),
        }
    return table | {
        f"{ours}.linear_kv_down_proj.weight": Rule((f"{hf}.kv_a_proj_with_mqa.weight",), 0),
        f"{ours}.kv_layernorm.weight": Rule((f"{hf}.kv_a_layernorm.weight",)),
        f"{ours}.linear_kv_up_proj.weight": Rule((f"{hf}.kv_b_proj.weight",), 0),
    }


def _mlp(ours: str, hf: str, expert: int | None = None) -> dict[str, Rule]:
    return {
        f"{ours}.linear_fc1.weight": _gate_up(hf, expert),
        f"{ours}.linear_fc2.weight": Rule((f"{hf}.down_proj.weight",), 1, expert=expert),
    }


def _experts(model: Architecture, ours: str, hf: str) -> dict[str, Rule]:
    assert model.moe is not None
    table = {f"{ours}.router.weight": Rule((f"{hf}.gate.weight",))}
    if model.moe.has_bias:
        table[f"{ours}.router.expert_bias"] = Rule((f"{hf}.gate.e_score_correction_bias",), is_float32=True)
    for e in range(model.moe.num_experts):
        table |= _mlp(f"{ours}.experts.local_experts.{e}", f"{hf}.experts.{e}", e)
    if model.moe.shared_size:
        table |= _mlp(f"{ours}.shared_experts", f"{hf}.shared_experts")
    return table


def hf_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the model, without its MTP modules."""
    return {name: _shape(model, name) for rule in rules(model).values() for name in rule.hf}


def mtp_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the MTP modules, which stand behind the last layer."""
    h, shapes = model.hidden_size, {}
    for i in range(model.num_layers, model.num_layers + model.num_mtp_layers):
        hf = f"model.layers.{i}"
        shapes |= {name: _shape(model, name) for rule in _layer(model, i, "", hf).values() for name in rule.hf}
        shapes |= {f"{hf}.{name}.weight": (model.vocab_size, h) for name in ("embed_tokens", "shared_head.head")}
        shapes |= {f"{hf}.{name}.weight": (h,) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{hf}.eh_proj.weight"] = (h, 2 * h)
    return shapes


def _shape(model: Architecture, name: str) -> tuple[int, ...]:
    h, q, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    last = ".".join(name.rsplit(".", 2)[-2:])
    if last in ("embed_tokens.weight", "lm_head.weight"):
        return model.vocab_size, h
    if ".mlp." in name:
        return _mlp_shape(model, name, last)
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (q, h), "k_proj.weight": (kv, h), "v_proj.weight": (kv, h), "o_proj.weight": (h, q),
        "q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,),
        "q_norm.weight": (model.head_dim,), "k_norm.weight": (model.head_dim,),
    }  # fmt: skip
    if mla := model.mla:
        shapes |= {
            "kv_a_proj_with_mqa.weight": (mla.kv_rank + mla.rope_dim, h),
            "kv_a_layernorm.weight": (mla.kv_rank,),
            "kv_b_proj.weight": (model.num_heads * (mla.nope_dim + mla.value_dim), mla.kv_rank),
            "o_proj.weight": (h, model.num_heads * mla.value_dim),
        }
        if mla.query_rank is not None:
            shapes |= {
                "q_a_proj.weight": (mla.query_rank, h),
                "q_a_layernorm.weight": (mla.query_rank,),
                "q_b_proj.weight": (q, mla.query_rank),
            }
    return shapes.get(last, (h,))


def _mlp_shape(model: Architecture, name: str, last: str) -> tuple[int, ...]:
    h, size = model.hidden_size, model.intermediate_size
    if moe := model.moe:
        if last == "gate.weight":
            return moe.num_experts, h
        if last == "gate.e_score_correction_bias":
            return (moe.num_experts,)
        size = moe.intermediate_size if ".experts." in name else moe.shared_size if "shared_experts" in name else size
    return (h, size) if last == "down_proj.weight" else (size, h)
