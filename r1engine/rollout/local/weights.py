"""The weights of a decoder: fused for speed, filled in place from tensors under their Hugging Face names.

`hf/tensors.py` says which tensors there are, and of which shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.tensors import EXPERT_BIAS, SCORE, hf_shapes, is_float32

# Elements: rows of 64 bytes in float32. Products with 683 columns are 6 to 20% slower than with 688 (AMD EPYC).
ALIGNMENT = 16


@dataclass(frozen=True)
class GroupedWeights:
    """Rows of `qkv` are query, key, value heads; rows of query and key heads are in rotary pairs."""

    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, D]
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None  # [head_dim], in rotary pairs
    key_norm: torch.Tensor | None


@dataclass(frozen=True)
class LatentWeights:
    """Queries, keys and values out of latents; the rotated dimensions are in rotary pairs as they come."""

    query_down: torch.Tensor | None  # [query_rank, D]; None: query_up takes the hidden state
    query_norm: torch.Tensor | None
    query_up: torch.Tensor  # [heads * head_dim, query_rank or D]
    key_value_down: torch.Tensor  # [kv_rank + rope_dim, D]
    key_value_norm: torch.Tensor  # [kv_rank]
    key_value_up: torch.Tensor  # [heads * (nope_dim + value_dim), kv_rank]


@dataclass(frozen=True)
class Mlp:
    """silu(gate) * up."""

    gate_up: torch.Tensor  # [2 * padded intermediate, D]; the padding is 0 and stays 0 through silu(gate) * up
    down: torch.Tensor  # [D, padded intermediate]


@dataclass(frozen=True)
class Mlps:
    """Several of one shape, as `moe_experts` takes them."""

    gate_up: torch.Tensor  # [E, 2 * padded intermediate, D]
    down: torch.Tensor  # [E, D, padded intermediate]
    each: list[Mlp]  # views


@dataclass(frozen=True)
class Experts:
    """Routed experts beside a shared one."""

    router: torch.Tensor  # [E, D]
    bias: torch.Tensor | None  # [E] float32, for the choice only
    routed: Mlps
    shared: Mlp | None


@dataclass(frozen=True)
class Layer:
    """One block."""

    attention_norm: torch.Tensor  # [D]
    attention: GroupedWeights | LatentWeights
    output: torch.Tensor  # [D, heads * value_dim]
    output_bias: torch.Tensor | None  # [D]
    mlp_norm: torch.Tensor  # [D]
    mlp: Mlp | Experts


class Weights:
    """Preallocated tensors, and the map from each Hugging Face name to the part it fills.

    Hugging Face rotates dimension i of a head with i + head_dim / 2. Here the two are neighbours, so that a pair
    is a complex number; queries and keys are permuted alike, so their products do not change.
    """

    def __init__(self, arch: Architecture, *, device: torch.device, dtype: torch.dtype) -> None:
        self._arch, self._shapes = arch, hf_shapes(arch)
        self._device, self._dtype = device, dtype
        self._targets: dict[str, torch.Tensor] = {}  # name -> a view to copy to; a reshape of the tensor fits it
        self.is_complete = False
        self.embedding = self._place("model.embed_tokens.weight")
        self.final_norm = self._place("model.norm.weight")
        self.head = self.embedding if arch.is_tied else self._place(SCORE if arch.head == "score" else "lm_head.weight")
        self.layers = [self._layer(index, f"model.layers.{index}.") for index in range(arch.num_layers)]
        assert self._targets.keys() == self._shapes.keys(), "every tensor has its place"

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies every tensor into its place, converting device and dtype.

        A tied model may bring `lm_head.weight` too, if it equals the embedding.

        Raises:
            ValueError: a tensor is unknown, duplicate, misshaped or missing; all of them are named. The weights are
                then partly replaced, and `is_complete` stays False until a load succeeds.
        """
        self.is_complete = False
        seen: set[str] = set()
        problems: list[str] = []
        tied_head = None
        for name, tensor in weights:
            if name in seen:
                problems.append(f"{name} comes twice")
            elif name == "lm_head.weight" and self._arch.is_tied:
                tied_head = tensor.detach().to(self.embedding, copy=True)  # the caller may reuse the tensor's memory
            elif name not in self._targets:
                problems.append(f"{name} is unknown")
            else:
                problems += self._copy(name, tensor)
            seen.add(name)
        problems += [f"{name} is missing" for name in self._targets if name not in seen]
        if tied_head is not None and not torch.equal(tied_head, self.embedding):
            problems.append("lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true")
        if problems:
            raise ValueError(f"load_weights: {'; '.join(problems)}")
        self.is_complete = True

    def _copy(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Fills the place of `name`; returns what is wrong with the tensor, if anything."""
        shape, target = self._shapes[name], self._targets[name]
        if tuple(tensor.shape) != shape:
            return [f"{name} is {tuple(tensor.shape)}, required is {shape}"]
        if not tensor.is_floating_point():
            return [f"{name} is {tensor.dtype}, required is a floating-point type"]
        target.copy_(tensor.detach().reshape(target.shape))
        return []

    def _layer(self, index: int, prefix: str) -> Layer:
        arch, attention, place = self._arch, prefix + "self_attn.", self._place
        return Layer(
            attention_norm=place(prefix + "input_layernorm.weight"),
            attention=self._latent_attention(attention) if arch.mla else self._grouped_attention(attention),
            output=place(attention + "o_proj.weight"),
            output_bias=self._place_if_any(attention + "o_proj.bias"),
            mlp_norm=place(prefix + "post_attention_layernorm.weight"),
            mlp=self._experts(prefix + "mlp.") if arch.has_experts(index) else self._mlp(prefix + "mlp."),
        )

    def _grouped_attention(self, prefix: str) -> GroupedWeights:
        return GroupedWeights(
            qkv=self._qkv(prefix, "weight"),
            qkv_bias=self._qkv(prefix, "bias") if prefix + "q_proj.bias" in self._shapes else None,
            query_norm=self._pairs_if_any(prefix + "q_norm.weight"),
            key_norm=self._pairs_if_any(prefix + "k_norm.weight"),
        )

    def _latent_attention(self, prefix: str) -> LatentWeights:
        place = self._place
        has_latent = prefix + "q_a_proj.weight" in self._shapes
        return LatentWeights(
            query_down=self._place_if_any(prefix + "q_a_proj.weight"),
            query_norm=self._place_if_any(prefix + "q_a_layernorm.weight"),
            query_up=place(prefix + ("q_b_proj.weight" if has_latent else "q_proj.weight")),
            key_value_down=place(prefix + "kv_a_proj_with_mqa.weight"),
            key_value_norm=place(prefix + "kv_a_layernorm.weight"),
            key_value_up=place(prefix + "kv_b_proj.weight"),
        )

    def _mlp(self, prefix: str) -> Mlp:
        return self._mlps([prefix]).each[0]

    def _mlps(self, prefixes: list[str]) -> Mlps:
        """Those of one shape, one behind the other."""
        size, hidden = self._shapes[prefixes[0] + "gate_proj.weight"]
        padded_size = -(-size // ALIGNMENT) * ALIGNMENT
        gate_up = self._new(len(prefixes), 2 * padded_size, hidden)
        down = self._new(len(prefixes), hidden, padded_size)
        made = Mlps(gate_up, down, [Mlp(*parts) for parts in zip(gate_up, down, strict=True)])
        for prefix, mlp in zip(prefixes, made.each, strict=True):
            gate, up = mlp.gate_up.view(2, padded_size, -1)[:, :size]
            self._targets[prefix + "gate_proj.weight"] = gate
            self._targets[prefix + "up_proj.weight"] = up
            self._targets[prefix + "down_proj.weight"] = mlp.down[:, :size]
        return made

    def _experts(self, prefix: str) -> Experts:
        moe = self._arch.moe
        assert moe is not None
        return Experts(
            router=self._place(prefix + "gate.weight"),
            bias=self._place_if_any(f"{prefix}gate.{EXPERT_BIAS}"),
            routed=self._mlps([f"{prefix}experts.{e}." for e in range(moe.num_experts)]),
            shared=self._mlp(prefix + "shared_experts.") if moe.shared_size else None,
        )

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self._device, dtype=self._dtype)

    def _place(self, name: str) -> torch.Tensor:
        """A tensor that takes the tensor of this name as it is."""
        dtype = torch.float32 if is_float32(name) else self._dtype
        self._targets[name] = torch.zeros(self._shapes[name], device=self._device, dtype=dtype)
        return self._targets[name]

    def _place_if_any(self, name: str) -> torch.Tensor | None:
        return self._place(name) if name in self._shapes else None

    def _qkv(self, prefix: str, kind: str) -> torch.Tensor:
        """q_proj, k_proj and v_proj, one under the other; queries and keys in rotary pairs."""
        names = [f"{prefix}{x}_proj.{kind}" for x in "qkv"]
        rows = [self._shapes[name][0] for name in names]
        fused = self._new(sum(rows), *self._shapes[names[0]][1:])
        query, key, value = fused.split(rows)
        self._targets |= {names[0]: self._in_pairs(query), names[1]: self._in_pairs(key), names[2]: value}
        return fused

    def _pairs_if_any(self, name: str) -> torch.Tensor | None:
        """A norm of heads, in rotary pairs."""
        norm = self._place_if_any(name)
        if norm is not None:
            self._targets[name] = self._in_pairs(norm)
        return norm

    def _in_pairs(self, place: torch.Tensor) -> torch.Tensor:
        """The view by which row 2i of a head's part takes the tensor's row i, row 2i + 1 its row i + head_dim / 2."""
        pairs = place.view(-1, self._arch.head_dim // 2, 2, *place.shape[1:])  # [heads, pair, half, ...]
        return pairs.transpose(1, 2)
