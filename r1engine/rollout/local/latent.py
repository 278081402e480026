"""Multi-head latent attention, of which one entry a token is kept for all heads: its latent, and behind it the rotated
part of its keys (DeepSeek-V3, section 2.1.1).

Keys and values are a matrix times the latent. For many tokens at once they are made, of one layer at a time: a pair of
tokens then takes 128 + 64 + 128 multiplications a head in DeepSeek's sizes, over the entries themselves 512 + 64 + 512;
and to make keys and values of a token takes 512 * (128 + 128), as it takes to bring its query and its result to the
entries and back. A decode step has one query a sequence, for which keys and values of all tokens before would be made
again. So it looks at the entries: the keys' half of the matrix goes into the query, the values' half behind the
attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1engine.hf.architecture import Architecture, Mla
from r1engine.rollout.local.cache import rotate
from r1engine.rollout.local.weights import LatentWeights


def project(
    layer: LatentWeights, arch: Architecture, normed: torch.Tensor, rotations: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries [N, heads, head_dim] and the entries [N, 1, kv_rank + rope_dim] of tokens."""
    mla, hidden = _mla(arch), normed
    if layer.query_down is not None and layer.query_norm is not None:
        hidden = F.linear(normed, layer.query_down)
        hidden = F.rms_norm(hidden, hidden.shape[1:], layer.query_norm, mla.norm_eps)
    query = F.linear(hidden, layer.query_up).view(-1, arch.num_heads, arch.head_dim)
    _rotate_end(query, mla.nope_dim, rotations)
    entries = F.linear(normed, layer.key_value_down).unsqueeze(1)
    latent = entries[:, :, : mla.kv_rank]
    latent.copy_(F.rms_norm(latent, (mla.kv_rank,), layer.key_value_norm, mla.norm_eps))
    _rotate_end(entries, mla.kv_rank, rotations)
    return query, entries


def keys_and_values(layer: LatentWeights, arch: Architecture, entries: torch.Tensor) -> torch.Tensor:
    """Of entries [B, T, kv_rank + rope_dim]: [2, B, heads, T, head_dim], values filled up with zeros."""
    mla = _mla(arch)
    latent, rope = entries.split([mla.kv_rank, mla.rope_dim], dim=2)
    made = F.linear(latent, layer.key_value_up).unflatten(2, (arch.num_heads, -1)).transpose(1, 2)
    key, value = made.split([mla.nope_dim, mla.value_dim], dim=3)
    out = entries.new_zeros(2, *key.shape[:3], arch.head_dim)
    keys, values = out
    keys[..., : mla.nope_dim] = key
    keys[..., mla.nope_dim :] = rope.unsqueeze(1)
    values[..., : mla.value_dim] = value
    return out


def over_entries(layer: LatentWeights, arch: Architecture, query: torch.Tensor) -> torch.Tensor:
    """Queries [N, heads, head_dim] as [N, heads, kv_rank + rope_dim]: times entries what they were times keys."""
    nope, rope = query.split([_mla(arch).nope_dim, _mla(arch).rope_dim], dim=2)
    keys, _ = _halves(layer, arch)
    return torch.cat([torch.bmm(nope.transpose(0, 1), keys).transpose(0, 1), rope], dim=2)


def values_of(layer: LatentWeights, arch: Architecture, mixed: torch.Tensor) -> torch.Tensor:
    """Weighted sums of latents [N, heads * kv_rank] as those of values [N, heads * value_dim]."""
    _, values = _halves(layer, arch)
    by_head = mixed.view(len(mixed), arch.num_heads, -1).transpose(0, 1)
    return torch.bmm(by_head, values.transpose(1, 2)).transpose(0, 1).flatten(1)


def _halves(layer: LatentWeights, arch: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """What makes keys [heads, nope_dim, kv_rank] and values [heads, value_dim, kv_rank] of a latent; views."""
    keys, values = layer.key_value_up.unflatten(0, (arch.num_heads, -1)).split(
        [_mla(arch).nope_dim, _mla(arch).value_dim], dim=1
    )
    return keys, values


def _rotate_end(heads: torch.Tensor, start: int, rotations: torch.Tensor) -> None:
    """Rotates what heads [N, heads, dim] have from `start` on, in place."""
    turned = heads[:, :, start:].contiguous()
    rotate(turned, rotations)
    heads[:, :, start:] = turned


def _mla(arch: Architecture) -> Mla:
    assert arch.mla is not None
    return arch.mla
