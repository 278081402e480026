"""Block quantization to FP8 (e4m3) and back: rows of 128 for activations, tiles of 128x128 for weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1kernels.dispatch import Impl, choose
from r1kernels.tracing import is_traced, traced_choice

HAVE = ("cuda", "reference")
BLOCKS = ((1, 128), (128, 128))


class Fp8(NamedTuple):
    """FP8 values and the factor of each block: x is about values * scale."""

    values: torch.Tensor  # [..., M, N] float8_e4m3fn
    scale: torch.Tensor  # [..., ceil(M / rows), ceil(N / columns)] float32


def fp8_quantize(x: torch.Tensor, *, block: tuple[int, int], impl: Impl | None = None) -> Fp8:
    """Quantize blocks of a matrix to e4m3, each with its own float32 scale (DeepSeek-V3, section 3.3.2).

        amax   = max(max |x| over the block, 1e-30)
        scale  = amax / 448
        values = e4m3(x * (448 / amax))

    All in float32. The cast rounds to nearest, ties to even, and saturates at 448; a block of zeros has values 0. A
    block that holds an infinity or a NaN gets that as its scale, so that all of it dequantizes to NaN: nothing is
    hidden. With block (128, 128) `scale` is the `weight_scale_inv` of the official DeepSeek-V3 checkpoint.

    Args:
        x:     [..., M, N] bfloat16 or float32, contiguous. (1, 128) needs N divisible by 128; (128, 128) cuts the
               blocks at the right and lower edges.
        block: (1, 128) or (128, 128), rows and columns that share a scale.
        impl:  force an implementation; None picks one by device.

    Returns:
        Fp8(values, scale).

    Raises:
        ValueError: x has another dtype or layout or less than one dimension (two for tiles), or the block does not fit.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1.0, 1.0, 256).view(2, 128)
        >>> values, scale = fp8_quantize(x, block=(1, 128))
        >>> values.dtype, scale
        (torch.float8_e4m3fn, tensor([[0.0022],
                [0.0022]]))
        >>> (fp8_dequantize(values, scale, block=(1, 128), dtype=torch.float32) - x).abs().max()
        tensor(0.0356)
    """
    op = "fp8_quantize"
    if is_traced(x):
        from r1kernels.fp8_cast import torch_op

        return Fp8(*torch_op.quantize(x.detach(), *block, traced_choice(op, impl, x.device.type, HAVE)))
    _check_block(op, "x", x, block)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: x must be bfloat16 or float32, got {x.dtype}")
    if choose(op, impl, x, have=HAVE) == "cuda":
        from r1kernels.fp8_cast.cuda_impl import quantize
    else:
        from r1kernels.fp8_cast.reference import quantize
    return Fp8(*quantize(x, block))


def fp8_dequantize(
    values: torch.Tensor,
    scale: torch.Tensor,
    *,
    block: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    impl: Impl | None = None,
) -> torch.Tensor:
    """values * scale, the product in float32, rounded once to `dtype`.

    Args:
        values: [..., M, N] float8_e4m3fn, contiguous.
        scale:  [..., ceil(M / rows), ceil(N / columns)] float32, contiguous: the factor of each block
                (`weight_scale_inv` of a DeepSeek-V3 checkpoint).
        block:  (1, 128) or (128, 128), rows and columns that share a scale.
        dtype:  bfloat16 or float32, of the result.
        impl:   force an implementation; None picks one by device.

    Returns:
        [..., M, N] of `dtype`.

    Raises:
        ValueError: dtypes, layouts or shapes are not the ones above, or devices differ.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> values, scale = torch.full((1, 128), 448.0).to(torch.float8_e4m3fn), torch.tensor([[0.5]])
        >>> fp8_dequantize(values, scale, block=(1, 128))[0, :3]
        tensor([224., 224., 224.], dtype=torch.bfloat16)
    """
    op = "fp8_dequantize"
    if is_traced(values):
        from r1kernels.fp8_cast import torch_op

        chosen = traced_choice(op, impl, values.device.type, HAVE)
        return torch_op.dequantize(values, scale.detach(), *block, dtype, chosen)
    _check_block(op, "values", values, block)
    if values.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{op}: values must be torch.float8_e4m3fn, got {values.dtype}")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    wanted = scale_shape(values.shape, block)
    if scale.shape != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"{op}: scale must be contiguous float32 {wanted} for values {tuple(values.shape)} in blocks of {block}, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    if scale.device != values.device:
        raise ValueError(f"{op}: scale is on {scale.device}, but values are on {values.device}")
    if choose(op, impl, values, have=HAVE) == "cuda":
        from r1kernels.fp8_cast.cuda_impl import dequantize
    else:
        from r1kernels.fp8_cast.reference import dequantize
    return dequantize(values, scale, block, dtype)


def scale_shape(shape: torch.Size, block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a tensor of `shape` in blocks of `block`."""
    if block == (1, 128):
        return (*shape[:-1], shape[-1] // 128)
    return (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))


def _check_block(op: str, name: str, x: torch.Tensor, block: tuple[int, int]) -> None:
    if block not in BLOCKS:
        raise ValueError(f"{op}: block must be (1, 128) or (128, 128), got {block}")
    least = 1 if block == (1, 128) else 2
    if x.dim() < least or not x.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous with at least {least} dimensions for block {block}, "
            f"got shape {tuple(x.shape)} stride {x.stride()}"
        )
    if block == (1, 128) and x.shape[-1] % 128:
        raise ValueError(
            f"{op}: the last dimension of {name} must be divisible by 128 for block (1, 128), got {x.shape[-1]}"
        )
