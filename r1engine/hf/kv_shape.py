"""What a generator keeps of a token: keys and values of each key head, or the latents of latent attention."""

from __future__ import annotations

from math import prod

from r1engine.hf.architecture import Architecture


def kv_shape(arch: Architecture) -> tuple[int, int, int]:
    """(parts, heads, numbers) of a token and layer: keys, then values; with latent attention one entry, the latent and
    behind it the rotated part of the keys, whose first numbers are its value."""
    if arch.mla is not None:
        return 1, 1, arch.mla.kv_rank + arch.mla.rope_dim
    return 2, arch.num_kv_heads, arch.head_dim


def kv_bytes(arch: Architecture, size: int = 2) -> int:
    """Bytes of a token in all layers; a number takes `size`, in bfloat16 2."""
    return arch.num_layers * prod(kv_shape(arch)) * size


def value_numbers(arch: Architecture) -> int:
    """Numbers of a value there."""
    return arch.mla.kv_rank if arch.mla is not None else arch.head_dim
