"""A dense decoder with a key/value cache, for generation only: no gradient, weights replaced in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from r1engine.architecture import Architecture
from r1engine.rollout.cache import KVCache, rotary_table
from r1engine.rollout.weights import Layer, Weights


@dataclass(frozen=True)
class Prefill:
    """What a batch of prompts leaves behind: their keys and values, and the logits after their last tokens."""

    kv: list[torch.Tensor]  # per layer [2, prompts, kv_heads, longest prompt, head_dim]; garbage after each prompt
    lengths: list[int]
    logits: torch.Tensor  # [prompts, V] float32


class Decoder:
    """The transformer. Activations of a decode step are [rows, D]: one token of every sequence."""

    def __init__(self, arch: Architecture, *, device: torch.device, dtype: torch.dtype) -> None:
        self.arch = arch
        self.device = device
        self.dtype = dtype
        self.weights = Weights(arch, device=device, dtype=dtype)

    def prefill(self, prompts: list[list[int]]) -> Prefill:
        """Runs whole prompts (token ids, none empty), padded on the right: nothing attends to what comes after."""
        arch, lengths = self.arch, [len(tokens) for tokens in prompts]
        batch, longest = len(prompts), max(lengths)
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in prompts], device=self.device)
        x = F.embedding(padded.view(-1), self.weights.embedding)  # [batch * longest, D]
        rotations = rotary_table(arch, longest, self.device).repeat(batch, 1).unsqueeze(1)
        kv = []
        for layer in self.weights.layers:
            query, key_value = self._project(layer, x, rotations)
            query = query.unflatten(0, (batch, longest)).transpose(1, 2)
            key_value = key_value.view(batch, longest, 2, arch.num_kv_heads, arch.head_dim)
            kv.append(key_value.permute(2, 0, 3, 1, 4).contiguous())
            mixed = F.scaled_dot_product_attention(query, kv[-1][0], kv[-1][1], is_causal=True, enable_gqa=True)
            self._finish_layer(layer, x, mixed.transpose(1, 2).reshape(batch * longest, -1))
        last = torch.tensor(lengths, device=self.device) - 1
        last += torch.arange(batch, device=self.device) * longest
        return Prefill(kv, lengths, self._logits(x[last]))

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, *, length: int) -> torch.Tensor:
        """Appends one token to each of the cache's first N sequences.

        Args:
            tokens:    [N] int64.
            positions: [N] int64, the index of each token in its sequence.
            cache:     holds everything before; takes the keys and values of `tokens`.
            length:    longest of these sequences with its token, positions.max() + 1 known without a device sync.

        Returns:
            [N, V] float32 logits of the tokens that follow.
        """
        arch, rows = self.arch, tokens.shape[0]
        x = F.embedding(tokens, self.weights.embedding)
        rotations = cache.rotations[positions].unsqueeze(1)
        mask, slots = cache.extend(positions, length)
        scale = arch.head_dim**-0.5
        for index, layer in enumerate(self.weights.layers):
            query, key_value = self._project(layer, x, rotations)
            keys, values = cache.append(index, slots, key_value, length)
            # [N * kv_heads, heads / kv_heads, head_dim]: the query heads of one key head are its batch.
            query = query.reshape(rows * arch.num_kv_heads, -1, arch.head_dim)
            # Not baddbmm, which takes longer than both.
            scores = torch.bmm(query, keys.transpose(1, 2))
            torch.add(mask, scores, alpha=scale, out=scores)
            probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(self.dtype)
            self._finish_layer(layer, x, torch.bmm(probs, values).view(rows, -1))
        return self._logits(x)

    def _project(self, layer: Layer, x: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries [N, heads, head_dim]; rotated keys, then values [N, 2 * kv_heads, head_dim]. Views."""
        arch = self.arch
        normed = F.rms_norm(x, (arch.hidden_size,), layer.attention_norm, arch.norm_eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, arch.head_dim)
        query, key, _ = qkv.split([arch.num_heads, arch.num_kv_heads, arch.num_kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query.copy_(F.rms_norm(query, (arch.head_dim,), layer.query_norm, arch.norm_eps))
            key.copy_(F.rms_norm(key, (arch.head_dim,), layer.key_norm, arch.norm_eps))
        _rotate(qkv[:, : arch.num_heads + arch.num_kv_heads], rotations)
        return query, qkv[:, arch.num_heads :]

    def _finish_layer(self, layer: Layer, x: torch.Tensor, mixed: torch.Tensor) -> None:
        """Adds the attention output and the MLP to x, in place."""
        arch = self.arch
        x.addmm_(mixed, layer.output.t())
        if layer.output_bias is not None:
            x.add_(layer.output_bias)
        normed = F.rms_norm(x, (arch.hidden_size,), layer.mlp_norm, arch.norm_eps)
        gate, up = torch.mm(normed, layer.gate_up).chunk(2, dim=1)
        x.addmm_(F.silu(gate).mul_(up), layer.down.t())

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x, (self.arch.hidden_size,), self.weights.final_norm, self.arch.norm_eps)
        return F.linear(normed, self.weights.head).float()


def _rotate(heads: torch.Tensor, rotations: torch.Tensor) -> None:
    """Turns each pair of neighbours of the last dimension by its angle, in place, in float32."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2))).mul_(rotations)
    if heads.dtype != torch.float32:  # float() made a copy
        heads.copy_(torch.view_as_real(pairs).flatten(-2))
