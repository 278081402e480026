"""Launches csrc/fp8_cast.cu."""

from __future__ import annotations

import math

import torch

from r1kernels import cuda_lib
from r1kernels.fp8_cast import scale_shape

MAX_BATCH = 65535  # gridDim.y


def quantize(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, N] bfloat16 or float32 -> (values, scale)."""
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(scale_shape(x.shape, block), dtype=torch.float32, device=x.device)
    if x.numel():
        suffix = "bf16" if x.dtype == torch.bfloat16 else "f32"
        cuda_lib.launch(f"r1_fp8_quantize_{suffix}", x, values, scale, *_sizes(x, block))
    return values, scale


def dequantize(
    values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(values [..., M, N], scale) -> [..., M, N] of `dtype`, bfloat16 or float32."""
    out = torch.empty_like(values, dtype=dtype)
    if values.numel():
        suffix = "bf16" if dtype == torch.bfloat16 else "f32"
        cuda_lib.launch(f"r1_fp8_dequantize_{suffix}", values, scale, out, *_sizes(values, block))
    return out


def _sizes(x: torch.Tensor, block: tuple[int, int]) -> tuple[int, int, int, int]:
    """(batch, m, n, rows of a block); rows of a whole batch are one matrix when each has its own scales."""
    if block[0] == 1:
        return 1, x.numel() // x.shape[-1], x.shape[-1], 1
    batch = math.prod(x.shape[:-2])
    if batch > MAX_BATCH:
        raise ValueError(f"fp8_cast: at most {MAX_BATCH} matrices of 128x128 blocks at a time, got {batch}")
    return batch, x.shape[-2], x.shape[-1], 128
