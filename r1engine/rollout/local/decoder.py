"""A decoder with a key/value cache, for generation only: no gradient, weights replaced in place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from r1engine.hf.architecture import Architecture
from r1engine.rollout.local import compiled
from r1engine.rollout.local.cache import Cache, KVCache, rotary_table
from r1engine.rollout.local.experts import Chosen, add_experts, add_mlp
from r1engine.rollout.local.weights import Experts, LatentWeights, Layer, Weights


@dataclass(frozen=True)
class Prefill:
    """What a batch of prompts leaves behind: their keys and values, and the logits after their last tokens."""

    kv: list[torch.Tensor]  # per layer [2, prompts, kv_heads, longest prompt, head_dim]; garbage after each prompt
    lengths: list[int]
    logits: torch.Tensor  # [prompts, V] float32
    experts: torch.Tensor | None  # [prompts, longest prompt, layers with experts, k] int64; None: there are none


@dataclass(frozen=True)
class Extended:
    """What sequences that went on leave behind."""

    hidden: list[torch.Tensor]  # of each sequence [T, D], behind the last norm, of its new tokens
    kv: list[torch.Tensor]  # of each [layers, 2, kv_heads, T, head_dim]: keys, then values, of its new tokens; views


class _Continued(NamedTuple):
    """Where the new tokens of sequences are in the rows of the attention. A row has a prefix, then its sequences."""

    sequences: list[tuple[int, int, int]]  # row, first key, tokens of each
    tokens: torch.Tensor  # [N] int64, of all sequences
    row: torch.Tensor  # [N] int64
    query: torch.Tensor  # [N] int64, place among the new tokens of the row
    key: torch.Tensor  # [N] int64, place among all its tokens
    positions: torch.Tensor  # [N] int64, in the sequence
    mask: torch.Tensor  # [rows, 1, queries, keys] bool: the prefix, and the sequence up to the token

    @classmethod
    def of(cls, tokens: list[list[list[int]]], before: list[int], device: torch.device) -> _Continued:
        """Of the sequences behind prefixes of so many tokens."""
        sequences = []
        for row, found in enumerate(tokens):
            starts = accumulate((len(ids) for ids in found[:-1]), initial=before[row])
            sequences += [(row, start, len(ids)) for start, ids in zip(starts, found, strict=True)]
        places = [(row, start, key) for row, start, count in sequences for key in range(start, start + count)]
        flat = [token for found in tokens for ids in found for token in ids]
        ids, row, start, key = torch.tensor([flat, *zip(*places, strict=True)], device=device)
        past = torch.tensor(before, device=device)
        query = key - past[row]
        keys = torch.arange(int(key.max()) + 1, device=device)
        mask = (keys < past[:, None, None]).repeat(1, int(query.max()) + 1, 1)
        mask[row, query] |= (keys >= start[:, None]) & (keys <= key[:, None])
        return cls(sequences, ids, row, query, key, past[row] + key - start, mask.unsqueeze(1))


class Decoder:
    """The transformer. Activations of a decode step are [rows, D]: one token of every sequence."""

    def __init__(self, arch: Architecture, *, device: torch.device, dtype: torch.dtype) -> None:
        self.arch = arch
        self.device = device
        self.dtype = dtype
        self.weights = Weights(arch, device=device, dtype=dtype)
        self._is_compiled = compiled.is_compiled(arch, self.weights)

    def prefill(self, prompts: list[list[int]]) -> Prefill:
        """Runs whole prompts (token ids, none empty), padded on the right: nothing attends to what comes after."""
        arch, lengths = self.arch, [len(tokens) for tokens in prompts]
        batch, longest = len(prompts), max(lengths)
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in prompts], device=self.device)
        x = F.embedding(padded.view(-1), self.weights.embedding)  # [batch * longest, D]
        rotations = rotary_table(arch, longest, self.device).repeat(batch, 1).unsqueeze(1)
        kv, experts = [], Chosen()
        for layer in self.weights.layers:
            query, key_value = self._project(layer, x, rotations)
            query = query.unflatten(0, (batch, longest)).transpose(1, 2)
            key_value = key_value.view(batch, longest, 2, arch.num_kv_heads, arch.head_dim)
            kv.append(key_value.permute(2, 0, 3, 1, 4).contiguous())
            mixed = F.scaled_dot_product_attention(
                query, kv[-1][0], kv[-1][1], is_causal=True, scale=arch.softmax_scale, enable_gqa=True
            )
            self._finish_layer(layer, x, mixed.transpose(1, 2).reshape(batch * longest, -1), experts)
        last = torch.tensor(lengths, device=self.device) - 1
        last += torch.arange(batch, device=self.device) * longest
        chosen = experts.stack()
        if chosen is not None:
            chosen = chosen.unflatten(0, (batch, longest))
        return Prefill(kv, lengths, self._logits(x[last]), chosen)

    def extend(self, tokens: list[list[list[int]]], past: list[list[torch.Tensor]]) -> Extended:
        """Runs new tokens of sequences behind what is kept of them; nothing of it is run again.

        Sequences that go on from one prefix are one row of the attention, each of which sees the prefix and itself:
        the prefix is read once for all of them. Matrix products see the new tokens alone, without padding.

        Args:
            tokens: of each prefix, those of each sequence that goes on from it, none empty.
            past:   of each prefix, in parts [layers, 2, kv_heads, P, head_dim]: keys and values of all its tokens.
        """
        arch, before = self.arch, [sum(part.shape[3] for part in parts) for parts in past]
        rows = _Continued.of(tokens, before, self.device)
        rotations = rotary_table(arch, int(rows.positions.max()) + 1, self.device)[rows.positions].unsqueeze(1)
        x = F.embedding(rows.tokens, self.weights.embedding)  # [N, D]
        kv = x.new_zeros(arch.num_layers, 2, len(past), arch.num_kv_heads, rows.mask.shape[3], arch.head_dim)
        for row, parts in enumerate(past):
            if parts:
                kv[:, :, row, :, : before[row]] = torch.cat(parts, dim=3)
        experts = Chosen()
        for layer, of_layer in zip(self.weights.layers, kv, strict=True):
            query, key_value = self._project(layer, x, rotations)
            of_layer[:, rows.row, :, rows.key] = key_value.view(len(x), 2, arch.num_kv_heads, arch.head_dim)
            padded = query.new_zeros(len(past), rows.mask.shape[2], *query.shape[1:])
            padded[rows.row, rows.query] = query
            keys, values = of_layer
            mixed = F.scaled_dot_product_attention(
                padded.transpose(1, 2), keys, values, attn_mask=rows.mask, scale=arch.softmax_scale, enable_gqa=True
            )
            self._finish_layer(layer, x, mixed.transpose(1, 2)[rows.row, rows.query].flatten(1), experts)
        hidden = F.rms_norm(x, (arch.hidden_size,), self.weights.final_norm, arch.norm_eps)
        own = [kv[:, :, row, :, start : start + count] for row, start, count in rows.sequences]
        return Extended([*hidden.split([count for _, _, count in rows.sequences])], own)

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Appends one token to each of the cache's first N sequences.

        Args:
            tokens:    [N] int64.
            positions: [N] int64, the index of each token in its sequence.
            cache:     holds everything before and has room; takes the keys and values of `tokens`.

        Returns:
            [N, V] float32 logits of the tokens that follow, and [N, layers with experts, k] int64 experts of `tokens`
            (None: there are none).
        """
        if self._is_compiled and isinstance(cache, KVCache):
            return compiled.step(self.arch, self.weights, tokens, positions, cache), None
        x = F.embedding(tokens, self.weights.embedding)
        rotations = cache.rotations[positions].unsqueeze(1)
        attend, experts = cache.attention(positions), Chosen()
        for index, layer in enumerate(self.weights.layers):
            self._finish_layer(layer, x, attend(index, *self._project(layer, x, rotations)), experts)
        return self._logits(x), experts.stack()

    def _project(self, layer: Layer, x: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [N, heads, head_dim]; rotated keys, then values [N, 2 * kv_heads, head_dim]. Views."""
        arch, attention = self.arch, layer.attention
        normed = F.rms_norm(x, (arch.hidden_size,), layer.attention_norm, arch.norm_eps)
        if isinstance(attention, LatentWeights):
            return self._project_latent(attention, normed, rotations)
        qkv = F.linear(normed, attention.qkv, attention.qkv_bias).view(x.shape[0], -1, arch.head_dim)
        query, key, _ = qkv.split([arch.num_heads, arch.num_kv_heads, arch.num_kv_heads], dim=1)
        if attention.query_norm is not None and attention.key_norm is not None:
            query.copy_(F.rms_norm(query, (arch.head_dim,), attention.query_norm, arch.norm_eps))
            key.copy_(F.rms_norm(key, (arch.head_dim,), attention.key_norm, arch.norm_eps))
        _rotate(qkv[:, : arch.num_heads + arch.num_kv_heads], rotations)
        return query, qkv[:, arch.num_heads :]

    def _project_latent(
        self, layer: LatentWeights, normed: torch.Tensor, rotations: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_project`; values are filled up with zeros to the keys' size."""
        arch, mla = self.arch, self.arch.mla
        assert mla is not None
        latent = normed
        if layer.query_down is not None and layer.query_norm is not None:
            latent = F.linear(normed, layer.query_down)
            latent = F.rms_norm(latent, latent.shape[1:], layer.query_norm, mla.norm_eps)
        query = F.linear(latent, layer.query_up).view(-1, arch.num_heads, arch.head_dim)
        latent, key_rope = F.linear(normed, layer.key_value_down).split([mla.kv_rank, mla.rope_dim], dim=1)
        latent = F.rms_norm(latent, (mla.kv_rank,), layer.key_value_norm, mla.norm_eps)
        key_value = F.linear(latent, layer.key_value_up).view(-1, arch.num_heads, mla.nope_dim + mla.value_dim)
        out = key_value.new_zeros(len(normed), 2 * arch.num_heads, arch.head_dim)
        keys, values = out.chunk(2, dim=1)
        keys[:, :, : mla.nope_dim] = key_value[:, :, : mla.nope_dim]
        values[:, :, : mla.value_dim] = key_value[:, :, mla.nope_dim :]
        key_rope = key_rope.contiguous().unsqueeze(1)
        _rotate(key_rope, rotations)
        keys[:, :, mla.nope_dim :] = key_rope
        query_rope = query[:, :, mla.nope_dim :].contiguous()
        _rotate(query_rope, rotations)
        query[:, :, mla.nope_dim :] = query_rope
        return query, out

    def _finish_layer(self, layer: Layer, x: torch.Tensor, mixed: torch.Tensor, experts: Chosen) -> None:
        """Adds the attention output and the MLP to x, in place."""
        arch = self.arch
        if arch.mla is not None:
            mixed = mixed.view(len(x), arch.num_heads, arch.head_dim)[:, :, : arch.mla.value_dim].flatten(1)
        x.addmm_(mixed, layer.output.t())
        if layer.output_bias is not None:
            x.add_(layer.output_bias)
        normed = F.rms_norm(x, (arch.hidden_size,), layer.mlp_norm, arch.norm_eps)
        if isinstance(layer.mlp, Experts):
            assert arch.moe is not None
            add_experts(x, normed, layer.mlp, arch.moe, experts)
        else:
            add_mlp(x, normed, layer.mlp)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x, (self.arch.hidden_size,), self.weights.final_norm, self.arch.norm_eps)
        return F.linear(normed, self.weights.head).float()


def _rotate(heads: torch.Tensor, rotations: torch.Tensor) -> None:
    """Turns each pair of neighbours of the last dimension by its angle, in place, in float32."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2))).mul_(rotations)
    if heads.dtype != torch.float32:  # float() made a copy
        heads.copy_(torch.view_as_real(pairs).flatten(-2))
