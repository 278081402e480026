"""torch.ops.r1kernels.fp8_quantize and fp8_dequantize: what torch.compile, torch.export and fake tensors see."""

from __future__ import annotations

import torch

from r1kernels.fp8_cast import fp8_dequantize, fp8_quantize, scale_shape
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::fp8_quantize", mutates_args=())
def quantize(x: torch.Tensor, rows: int, columns: int, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The fields of Fp8."""
    values, scale = fp8_quantize(x, block=(rows, columns), impl=wish(impl))
    return values, scale


@quantize.register_fake
def _(x, rows, columns, impl):
    scale = x.new_empty(scale_shape(x.shape, (rows, columns)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


@torch.library.custom_op("r1kernels::fp8_dequantize", mutates_args=())
def dequantize(
    values: torch.Tensor, scale: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, impl: str
) -> torch.Tensor:
    """As fp8_dequantize."""
    return fp8_dequantize(values, scale, block=(rows, columns), dtype=dtype, impl=wish(impl))


@dequantize.register_fake
def _(values, scale, rows, columns, dtype, impl):
    return values.new_empty(values.shape, dtype=dtype)
