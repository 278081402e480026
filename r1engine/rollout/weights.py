"""The weights of a decoder: fused for speed, filled in place from tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from r1engine.architecture import Architecture

# Elements: rows of 64 bytes in float32. Products with 683 columns are 6 to 20% slower than with 688 (AMD EPYC).
ALIGNMENT = 16


@dataclass(frozen=True)
class Layer:
    """One block. Rows of `qkv` are query, key, value heads; rows of query and key heads are in rotary pairs."""

    attention_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * head_dim, D]
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None  # [head_dim], in rotary pairs
    key_norm: torch.Tensor | None
    output: torch.Tensor  # [D, heads * head_dim]
    output_bias: torch.Tensor | None  # [D]
    mlp_norm: torch.Tensor  # [D]
    gate_up: torch.Tensor  # [D, 2 * padded intermediate]; the padding is 0 and stays 0 through silu(gate) * up
    down: torch.Tensor  # [D, padded intermediate]


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
        self.layers = [self._layer(f"model.layers.{index}.") for index in range(arch.num_layers)]

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

    def _layer(self, prefix: str) -> Layer:
        arch, new, attention = self._arch, self._new, prefix + "self_attn."
        padded_size = -(-arch.intermediate_size // ALIGNMENT) * ALIGNMENT
        layer = Layer(
            attention_norm=new(arch.hidden_size),
            qkv=new((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim, arch.hidden_size),
            qkv_bias=new((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim) if arch.has_qkv_bias else None,
            query_norm=new(arch.head_dim) if arch.has_qk_norm else None,
            key_norm=new(arch.head_dim) if arch.has_qk_norm else None,
            output=new(arch.hidden_size, arch.num_heads * arch.head_dim),
            output_bias=new(arch.hidden_size) if arch.has_output_bias else None,
            mlp_norm=new(arch.hidden_size),
            gate_up=new(
                arch.hidden_size, 2 * padded_size
            ),  # for few rows MKL takes a quarter less time than for [2I, D]
            down=new(arch.hidden_size, padded_size),
        )
        self._expect(prefix + "input_layernorm.weight", layer.attention_norm)
        self._expect(prefix + "post_attention_layernorm.weight", layer.mlp_norm)
        self._expect_qkv(attention, "weight", layer.qkv)
        if layer.qkv_bias is not None:
            self._expect_qkv(attention, "bias", layer.qkv_bias)
        if layer.query_norm is not None and layer.key_norm is not None:
            self._expect_paired(attention + "q_norm.weight", layer.query_norm)
            self._expect_paired(attention + "k_norm.weight", layer.key_norm)
        self._expect(attention + "o_proj.weight", layer.output)
        if layer.output_bias is not None:
            self._expect(attention + "o_proj.bias", layer.output_bias)
        gate, up = layer.gate_up.view(-1, 2, padded_size)[:, :, : arch.intermediate_size].permute(1, 2, 0)
        self._expect(prefix + "mlp.gate_proj.weight", gate)
        self._expect(prefix + "mlp.up_proj.weight", up)
        self._expect(prefix + "mlp.down_proj.weight", layer.down[:, : arch.intermediate_size])
        return layer

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
