"""A decoder with a key/value cache, for generation only: no gradient, weights replaced in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from r1engine.hf.architecture import Architecture
from r1engine.hf.kv_shape import kv_shape
from r1engine.rollout.local import compiled, latent
from r1engine.rollout.local.cache import Cache, KVCache, rotary_table, rotate
from r1engine.rollout.local.experts import Chosen, add_experts, add_mlp
from r1engine.rollout.local.new_tokens import NewTokens, sequences_of
from r1engine.rollout.local.weights import Experts, LatentWeights, Layer, Weights


@dataclass(frozen=True)
class Prefill:
    """What a batch of prompts leaves behind: their keys and values, and the logits after their last tokens."""

    kv: list[torch.Tensor]  # per layer [parts, prompts, heads, longest prompt, numbers]; garbage after each prompt
    lengths: list[int]
    logits: torch.Tensor  # [prompts, V] float32
    experts: torch.Tensor | None  # [prompts, longest prompt, layers with experts, k] int64; None: there are none


@dataclass(frozen=True)
class Extended:
    """What sequences that went on leave behind."""

    hidden: torch.Tensor  # [N, D], behind the last norm, of the new tokens of all sequences in order
    kv: list[torch.Tensor]  # of each [layers, parts, heads, T, numbers] of its new tokens; views


class Decoder:
    """The transformer. Activations of a decode step are [rows, D]: one token of every sequence.

    What is kept of a token is of `kv_shape`: parts, heads, numbers.

    Where it is compiled, `prefill`, `extend` and `step` are one function, of which nothing that is computed with a
    token, or was computed before, changes a bit. PyTorch's products and attention round by the shape of all.
    """

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
        if self._is_compiled:
            hidden, all_kv = self._run([[tokens] for tokens in prompts], [[] for _ in prompts])
            ends = torch.tensor(lengths).cumsum(0) - 1
            return Prefill([*all_kv], lengths, compiled.linear(hidden[ends], self.weights.head), None)
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in prompts], device=self.device)
        x = F.embedding(padded.view(-1), self.weights.embedding)  # [batch * longest, D]
        rotations = rotary_table(arch, longest, self.device).repeat(batch, 1).unsqueeze(1)
        kv, experts = [], Chosen()
        for layer in self.weights.layers:
            query, key_value = self._project(layer, x, rotations)
            kv.append(key_value.view(batch, longest, *kv_shape(arch)).permute(2, 0, 3, 1, 4).contiguous())
            mixed = self._attend(layer, query.unflatten(0, (batch, longest)), kv[-1])
            self._finish_layer(layer, x, mixed.flatten(0, 1), experts)
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
            past:   of each prefix, in pieces [layers, parts, heads, P, numbers]: what is kept of all its tokens.
        """
        hidden, kv = self._run(tokens, past)
        sequences = sequences_of(tokens, _lengths(past))
        return Extended(hidden, [kv[:, :, row, :, start : start + count] for row, start, count in sequences])

    def _run(self, tokens: list[list[list[int]]], past: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `extend`; returns the new tokens' [N, D] behind the last norm, and all that is kept
        [layers, parts, prefixes, heads, longest row, numbers]: the row of a prefix has it, then its sequences."""
        arch, before = self.arch, _lengths(past)
        new = NewTokens.behind(tokens, before, self.device)
        rotations = rotary_table(arch, int(new.positions.max()) + 1, self.device)
        kept, heads, numbers = kv_shape(arch)
        shape = (arch.num_layers, kept, len(past), heads, int(new.places.max()) + 1, numbers)
        kv = torch.zeros(shape, device=self.device, dtype=self.dtype)
        for row, parts in enumerate(past):
            if parts:
                kv[:, :, row, :, : before[row]] = torch.cat(parts, dim=3)
        if self._is_compiled:
            x = compiled.run(arch, self.weights, new, rotations, [*kv])
            return compiled.from_panels(x, len(new.ids)), kv
        x = F.embedding(new.ids, self.weights.embedding)  # [N, D]
        angles, experts, (queries, mask) = rotations[new.positions].unsqueeze(1), Chosen(), new.mask()
        for layer, of_layer in zip(self.weights.layers, kv, strict=True):
            query, key_value = self._project(layer, x, angles)
            of_layer[:, new.rows, :, new.places] = key_value.view(len(x), *kv_shape(arch))
            padded = query.new_zeros(len(past), mask.shape[2], *query.shape[1:])
            padded[new.rows, queries] = query
            mixed = self._attend(layer, padded, of_layer, mask)
            self._finish_layer(layer, x, mixed[new.rows, queries], experts)
        return F.rms_norm(x, (arch.hidden_size,), self.weights.final_norm, arch.norm_eps), kv

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
            count = len(tokens)
            new = NewTokens(tokens, positions, torch.arange(count), positions, torch.zeros_like(positions))
            x = compiled.run(self.arch, self.weights, new, cache.rotations, cache.layers)
            return compiled.project(x, count, self.weights.head), None
        x = F.embedding(tokens, self.weights.embedding)
        rotations = cache.rotations[positions].unsqueeze(1)
        attend, experts = cache.attention(positions), Chosen()
        for index, layer in enumerate(self.weights.layers):
            query, key_value = self._project(layer, x, rotations)
            if isinstance(layer.attention, LatentWeights):
                mixed = attend(index, latent.over_entries(layer.attention, self.arch, query), key_value)
                mixed = latent.values_of(layer.attention, self.arch, mixed)
            else:
                mixed = attend(index, query, key_value)
            self._finish_layer(layer, x, mixed, experts)
        return self._logits(x), experts.stack()

    def _attend(
        self, layer: Layer, query: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries of many tokens [B, T, heads, head_dim] look at [parts, B, heads, keys, numbers], without a mask at
        what is not behind them; returns [B, T, heads * value_dim]."""
        arch, value_dim = self.arch, self.arch.head_dim
        if isinstance(layer.attention, LatentWeights) and arch.mla is not None:
            kv, value_dim = latent.keys_and_values(layer.attention, arch, kv[0, :, 0]), arch.mla.value_dim
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), kv[0], kv[1], mask, is_causal=mask is None, scale=arch.softmax_scale, enable_gqa=True
        )
        return mixed[..., :value_dim].transpose(1, 2).flatten(2)

    def _project(self, layer: Layer, x: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [N, heads, head_dim], and what is kept [N, parts * heads, numbers]. Views."""
        arch, attention = self.arch, layer.attention
        normed = F.rms_norm(x, (arch.hidden_size,), layer.attention_norm, arch.norm_eps)
        if isinstance(attention, LatentWeights):
            return latent.project(attention, arch, normed, rotations)
        qkv = F.linear(normed, attention.qkv, attention.qkv_bias).view(x.shape[0], -1, arch.head_dim)
        query, key, _ = qkv.split([arch.num_heads, arch.num_kv_heads, arch.num_kv_heads], dim=1)
        if attention.query_norm is not None and attention.key_norm is not None:
            query.copy_(F.rms_norm(query, (arch.head_dim,), attention.query_norm, arch.norm_eps))
            key.copy_(F.rms_norm(key, (arch.head_dim,), attention.key_norm, arch.norm_eps))
        rotate(qkv[:, : arch.num_heads + arch.num_kv_heads], rotations)
        return query, qkv[:, arch.num_heads :]

    def _finish_layer(self, layer: Layer, x: torch.Tensor, mixed: torch.Tensor, experts: Chosen) -> None:
        """Adds the attention output and the MLP to x, in place."""
        arch = self.arch
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


def _lengths(past: list[list[torch.Tensor]]) -> list[int]:
    """Tokens of each prefix."""
    return [sum(part.shape[3] for part in parts) for parts in past]
