"""What fp8_cast means, in PyTorch; the other FP8 ops build their references from the functions here."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-30  # far below any gradient, far above where 448 / amax overflows


def quantize(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, N] -> (values, scale), with a scale for each block of (rows, columns); edges are cut."""
    if x.dim() == 1:
        values, scale = quantize(x[None], block)
        return values[0], scale[0]
    rows, columns = block
    *batch, m, n = x.shape
    # Zeros around the edge do not change any |x| maximum.
    padded = torch.nn.functional.pad(x.float(), (0, -n % columns, 0, -m % rows))
    tiles = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., M/rows, rows, N/columns, columns]
    amax = tiles.abs().amax(dim=(-3, -1), keepdim=True) if x.numel() else tiles.new_zeros(*batch, *_tiles(m, n, block))
    amax = amax.clamp(min=AMAX_FLOOR)
    # torch computes number / tensor as number * (1 / tensor), which rounds twice.
    values = to_e4m3(tiles * (torch.full_like(amax, E4M3_MAX) / amax)).flatten(-4, -3).flatten(-2, -1)[..., :m, :n]
    return values.contiguous(), (amax / E4M3_MAX)[..., 0, :, 0].contiguous()


def dequantize(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(values [..., M, N], scale) -> [..., M, N] of `dtype`."""
    wide = scale.repeat_interleave(block[1], dim=-1)[..., : values.shape[-1]]
    if block[0] > 1:
        wide = wide.repeat_interleave(block[0], dim=-2)[..., : values.shape[-2], :]
    return (values.float() * wide).to(dtype)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e4m3 value, ties to even; beyond 448 saturate (torch's own cast gives NaN); NaN stays."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _tiles(m: int, n: int, block: tuple[int, int]) -> tuple[int, int, int, int]:
    return -(-m // block[0]), 1, -(-n // block[1]), 1
