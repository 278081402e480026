"""Hugging Face names <-> Megatron parameters: one rule a parameter, exact in both directions.

`hf/tensors.py` says which tensors a model has. The rules of a layer say what Megatron makes of each, and a layer gets
those rules whose tensors it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.tensors import EXPERT_BIAS, SCORE, hf_shapes, layer_shapes, mtp_layers
from r1engine.model.layers.experts import MATRICES


@dataclass(frozen=True)
class WeightRule:
    """How one Megatron parameter is made of Hugging Face tensors, and these of it.

    A rank's parameter is `fuse` of its slices of the Hugging Face tensors; `unfuse` gives the slices back.
    """

    hf: tuple[str, ...]
    dim: int | None = None  # the dimension of each HF tensor that is split evenly over ranks; None: every rank has all
    fuse: Callable[[list[torch.Tensor]], torch.Tensor] = lambda slices: slices[0]
    unfuse: Callable[[torch.Tensor], list[torch.Tensor]] = lambda parameter: [parameter]
    expert: int | None = None  # the routed expert that it belongs to

    def slice_of(self, size: int, rank: int, ranks: int) -> slice:
        """The part of dimension `dim` (of `size`) that a rank has; the last ones have less where it is padded."""
        per_rank = -(-size // ranks)
        return slice(min(rank * per_rank, size), min((rank + 1) * per_rank, size))


Rules = dict[str, WeightRule]  # Megatron's name of a parameter -> how it is made


def rules(model: Architecture) -> Rules:
    """For the whole model, with global layer and expert numbers, in the order of Hugging Face.

    Raises:
        ValueError: the model has a tensor that no rule takes.
    """
    table = {"embedding.word_embeddings.weight": WeightRule(("model.embed_tokens.weight",), 0)}
    known = _layer(model)
    for i in range(model.num_layers):
        table |= _chosen(known, model, i, f"decoder.layers.{i}")
    table["decoder.final_layernorm.weight"] = WeightRule(("model.norm.weight",))
    shapes = hf_shapes(model)
    if "lm_head.weight" in shapes:
        table["output_layer.weight"] = WeightRule(("lm_head.weight",), 0)
    if SCORE in shapes:
        table["score.weight"] = WeightRule((SCORE,))
    return table


def mtp_rules(model: Architecture) -> Rules:
    """The same for the MTP modules, without their copies of embedding and output matrix."""
    table: Rules = {}
    known = _layer(model)
    for depth, layer in enumerate(mtp_layers(model)):
        ours, hf = f"drafts.{depth}", f"model.layers.{layer}"
        table |= {f"{ours}.{name}.weight": WeightRule((f"{hf}.{name}.weight",)) for name in ("enorm", "hnorm")}
        table[f"{ours}.eh_proj.weight"] = WeightRule((f"{hf}.eh_proj.weight",), 0)
        table |= _chosen(known, model, layer, f"{ours}.layer")
        table[f"{ours}.norm.weight"] = WeightRule((f"{hf}.shared_head.norm.weight",))
    return table


def _chosen(known: Rules, model: Architecture, layer: int, ours: str) -> Rules:
    """Of the rules that layers can have, those of one layer."""
    tensors = layer_shapes(model, layer).keys()
    chosen = {name: rule for name, rule in known.items() if tensors >= {*rule.hf}}
    if untaken := tensors - {hf for rule in chosen.values() for hf in rule.hf}:
        raise ValueError(f"rules: no Megatron parameter takes {', '.join(sorted(untaken))} of layer {layer}")
    return _inside(ours, f"model.layers.{layer}", chosen)


def _layer(model: Architecture) -> Rules:
    """All that a layer of this model can have, named inside the layer, in the order of Hugging Face."""
    attention = _latent_attention() if model.mla else _attention(model)
    return {
        "input_layernorm.weight": WeightRule(("input_layernorm.weight",)),
        **_inside("self_attention", "self_attn", attention),
        "pre_mlp_layernorm.weight": WeightRule(("post_attention_layernorm.weight",)),
        **_inside("mlp", "mlp", _mlp()),
        **_inside("mlp", "mlp", _experts(model.moe.num_experts if model.moe else 0)),
    }


def _attention(model: Architecture) -> Rules:
    return {
        "linear_qkv.weight": _qkv("weight", model),
        "linear_qkv.bias": _qkv("bias", model),
        "q_layernorm.weight": WeightRule(("q_norm.weight",)),
        "k_layernorm.weight": WeightRule(("k_norm.weight",)),
        "linear_proj.weight": WeightRule(("o_proj.weight",), 1),
    }


def _latent_attention() -> Rules:
    return {
        "linear_q_proj.weight": WeightRule(("q_proj.weight",), 0),
        "linear_q_down_proj.weight": WeightRule(("q_a_proj.weight",), 0),
        "q_layernorm.weight": WeightRule(("q_a_layernorm.weight",)),
        "linear_q_up_proj.weight": WeightRule(("q_b_proj.weight",), 0),
        "linear_kv_down_proj.weight": WeightRule(("kv_a_proj_with_mqa.weight",), 0),
        "kv_layernorm.weight": WeightRule(("kv_a_layernorm.weight",)),
        "linear_kv_up_proj.weight": WeightRule(("kv_b_proj.weight",), 0),
        "linear_proj.weight": WeightRule(("o_proj.weight",), 1),
    }


def _mlp() -> Rules:
    # Each rank holds its part of gate, then its part of up: the halves are split, never the whole.
    halves = ("gate_proj.weight", "up_proj.weight")
    return {
        "linear_fc1.weight": WeightRule(halves, 0, torch.cat, lambda parameter: list(parameter.chunk(2))),
        "linear_fc2.weight": WeightRule(("down_proj.weight",), 1),
    }


def _experts(num_experts: int) -> Rules:
    table = {"router.weight": WeightRule(("gate.weight",)), "router.expert_bias": WeightRule((f"gate.{EXPERT_BIAS}",))}
    for e in range(num_experts):
        mlp = {name: replace(rule, expert=e) for name, rule in _mlp().items()}
        table |= _inside(f"experts.local_experts.{e}", f"experts.{e}", mlp)
    return table | _inside("shared_experts", "shared_experts", _mlp())


def one_by_one(name: str, experts: range) -> list[str]:
    """The names of the rules that a parameter follows: its own, or, of a matrix of all `experts`, one for each."""
    module, _, last = name.rpartition(".")
    if not module.endswith(".experts"):
        return [name]
    return [f"{module}.local_experts.{e}.{MATRICES[last]}" for e in experts]


def _qkv(kind: str, model: Architecture) -> WeightRule:
    """Megatron keeps, for every key-value head, its query heads, its key and its value together."""
    per_group, head = model.num_heads // model.num_kv_heads, model.head_dim

    def fuse(slices: list[torch.Tensor]) -> torch.Tensor:
        groups, rest = slices[1].shape[0] // head, slices[0].shape[1:]
        return torch.cat([t.reshape(groups, -1, *rest) for t in slices], dim=1).reshape(-1, *rest)

    def unfuse(parameter: torch.Tensor) -> list[torch.Tensor]:
        rest = parameter.shape[1:]
        parts = parameter.view(-1, (per_group + 2) * head, *rest).split([per_group * head, head, head], dim=1)
        return [p.reshape(-1, *rest) for p in parts]

    return WeightRule(tuple(f"{x}_proj.{kind}" for x in "qkv"), 0, fuse, unfuse)


def _inside(ours: str, hf: str, table: Rules) -> Rules:
    """Rules of a module, named from outside of it."""
    return {
        f"{ours}.{name}": replace(rule, hf=tuple(f"{hf}.{part}" for part in rule.hf)) for name, rule in table.items()
    }
