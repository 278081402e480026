"""The weights of a decoder: fused for speed, filled in place from tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from r1engine.hf.architecture import Architecture

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
class Experts:
    """Routed experts beside a shared one."""

    router: torch.Tensor  # [E, D]
    bias: torch.Tensor | None  # [E] float32, for the choice only
    routed: list[Mlp]
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
        self._arch = arch
        self._new = lambda *shape: torch.zeros(shape, device=device, dtype=dtype)
        self._targets: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}  # name -> (its shape, a view to copy to)
        self.is_complete = False
        self.embedding = self._new(arch.vocab_size, arch.hidden_size)
        self.final_norm = self._new(arch.hidden_size)
        self.head = self.embedding if arch.is_tied else self._new(arch.vocab_size, arch.hidden_size)
        self._expect("model.embed_tokens.weight", self.embedding)
        self._expect("model.norm.weight", self.final_norm)
        if not arch.is_tied:
            self._expect("lm_head.weight", self.head)
        self.layers = [self._layer(index, f"model.layers.{index}.") for index in range(arch.num_layers)]

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
        shape, target = self._targets[name]
        if tuple(tensor.shape) != shape:
            return [f"{name} is {tuple(tensor.shape)}, required is {shape}"]
        if not tensor.is_floating_point():
            return [f"{name} is {tensor.dtype}, required is a floating-point type"]
        target.copy_(tensor.detach().reshape(target.shape))
        return []

    def _layer(self, index: int, prefix: str) -> Layer:
        arch, attention = self._arch, prefix + "self_attn."
        value_dim = arch.mla.value_dim if arch.mla else arch.head_dim
        return Layer(
            attention_norm=self._place(prefix + "input_layernorm.weight", arch.hidden_size),
            attention=self._latent_attention(attention) if arch.mla else self._grouped_attention(attention),
            output=self._place(attention + "o_proj.weight", arch.hidden_size, arch.num_heads * value_dim),
            output_bias=self._place(attention + "o_proj.bias", arch.hidden_size) if arch.has_output_bias else None,
            mlp_norm=self._place(prefix + "post_attention_layernorm.weight", arch.hidden_size),
            mlp=self._experts(prefix + "mlp.")
            if arch.has_experts(index)
            else self._mlp(prefix + "mlp.", arch.intermediate_size),
        )

    def _grouped_attention(self, prefix: str) -> GroupedWeights:
        arch, new = self._arch, self._new
        attention = GroupedWeights(
            qkv=new((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim, arch.hidden_size),
            qkv_bias=new((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim) if arch.has_qkv_bias else None,
            query_norm=new(arch.head_dim) if arch.has_qk_norm else None,
            key_norm=new(arch.head_dim) if arch.has_qk_norm else None,
        )
        self._expect_qkv(prefix, "weight", attention.qkv)
        if attention.qkv_bias is not None:
            self._expect_qkv(prefix, "bias", attention.qkv_bias)
        if attention.query_norm is not None and attention.key_norm is not None:
            self._expect_paired(prefix + "q_norm.weight", attention.query_norm)
            self._expect_paired(prefix + "k_norm.weight", attention.key_norm)
        return attention

    def _latent_attention(self, prefix: str) -> LatentWeights:
        arch, mla = self._arch, self._arch.mla
        assert mla is not None
        queries, rank, place = arch.num_heads * arch.head_dim, mla.query_rank, self._place
        return LatentWeights(
            query_down=place(prefix + "q_a_proj.weight", rank, arch.hidden_size) if rank else None,
            query_norm=place(prefix + "q_a_layernorm.weight", rank) if rank else None,
            query_up=place(prefix + "q_b_proj.weight", queries, rank)
            if rank
            else place(prefix + "q_proj.weight", queries, arch.hidden_size),
            key_value_down=place(prefix + "kv_a_proj_with_mqa.weight", mla.kv_rank + mla.rope_dim, arch.hidden_size),
            key_value_norm=place(prefix + "kv_a_layernorm.weight", mla.kv_rank),
            key_value_up=place(
                prefix + "kv_b_proj.weight", arch.num_heads * (mla.nope_dim + mla.value_dim), mla.kv_rank
            ),
        )

    def _mlp(self, prefix: str, size: int) -> Mlp:
        padded_size = -(-size // ALIGNMENT) * ALIGNMENT
        mlp = Mlp(
            gate_up=self._new(2 * padded_size, self._arch.hidden_size),
            down=self._new(self._arch.hidden_size, padded_size),
        )
        gate, up = mlp.gate_up.view(2, padded_size, -1)[:, :size]
        self._expect(prefix + "gate_proj.weight", gate)
        self._expect(prefix + "up_proj.weight", up)
        self._expect(prefix + "down_proj.weight", mlp.down[:, :size])
        return mlp

    def _experts(self, prefix: str) -> Experts:
        moe = self._arch.moe
        assert moe is not None
        bias = None
        if moe.has_bias:
            bias = self._new(moe.num_experts).float()
            self._expect(prefix + "gate.e_score_correction_bias", bias)
        return Experts(
            router=self._place(prefix + "gate.weight", moe.num_experts, self._arch.hidden_size),
            bias=bias,
            routed=[self._mlp(f"{prefix}experts.{e}.", moe.intermediate_size) for e in range(moe.num_experts)],
            shared=self._mlp(prefix + "shared_experts.", moe.shared_size) if moe.shared_size else None,
        )

    def _place(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor that takes the tensor of this name as it is."""
        tensor = self._new(*shape)
        self._expect(name, tensor)
        return tensor

    def _expect(self, name: str, place: torch.Tensor) -> None:
        self._targets[name] = (tuple(place.shape), place)

    def _expect_qkv(self, prefix: str, kind: str, fused: torch.Tensor) -> None:
        """Splits the rows of the fused tensor among q_proj, k_proj and v_proj."""
        arch = self._arch
        sizes = [heads * arch.head_dim for heads in (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)]
        query, key, value = fused.split(sizes)
        self._expect_paired(f"{prefix}q_proj.{kind}", query)
        self._expect_paired(f"{prefix}k_proj.{kind}", key)
        self._expect(f"{prefix}v_proj.{kind}", value)

    def _expect_paired(self, name: str, place: torch.Tensor) -> None:
        """Row 2i of a head's part takes the tensor's row i, row 2i + 1 its row i + head_dim / 2."""
        pairs = place.view(-1, self._arch.head_dim // 2, 2, *place.shape[1:])  # [heads, pair, half, ...]
        self._targets[name] = (tuple(place.shape), pairs.transpose(1, 2))
