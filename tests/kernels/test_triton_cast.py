"""round_to against torch's casts, bit for bit, under the interpreter; on a GPU the same test runs compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from r1kernels import triton_cast
from r1kernels.triton_cast import e4m3_scales, round_to

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def round_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    tl.store(out_ptr + offsets, round_to(x, out_ptr.dtype.element_ty), mask=offsets < size)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(x), dtype=dtype, device=DEVICE)
    round_kernel[(triton.cdiv(len(x), 1024),)](x.to(DEVICE), out, len(x), BLOCK=1024)
    return out.cpu()


def values() -> torch.Tensor:
    """Every bfloat16 and e4m3 value, the ties between neighbours and one step beside them; random ones of all sizes."""
    narrow = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    narrow = narrow[narrow.isfinite()]
    octets = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    octets = octets[octets.isfinite()].sort().values
    middle = (octets[1:] + octets[:-1]) / 2
    ties = (narrow.view(torch.int32) | 0x8000).view(torch.float32)
    exact = torch.cat([narrow[::7], ties[::3], octets, middle])
    beside = [torch.nextafter(torch.cat([ties[::3], middle]), torch.tensor(far)) for far in (-torch.inf, torch.inf)]
    random = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    exponents = torch.arange(20000) % 60 - 40
    return torch.cat([exact, *beside, random * 2.0**exponents, torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_as_torch_does(dtype):
    x = values()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(rounded(x, dtype).view(bits), x.to(dtype).view(bits))


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no e4m3 in hardware")
def test_e4m3_rounds_as_torch_does_and_saturates():
    x = values()
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(rounded(x, torch.float8_e4m3fn).view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_nan_stays_nan(dtype):
    patterns = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF], dtype=torch.int32)
    assert rounded(patterns.view(torch.float32), dtype).isnan().all()


@triton.jit
def scales_kernel(amax_ptr, factor_ptr, scale_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor, scale = e4m3_scales(tl.load(amax_ptr + place))
    tl.store(factor_ptr + place, factor)
    tl.store(scale_ptr + place, scale)


def exact_multiply_add(self, x, y, z):
    """A product of two float32 is exact in float64, and so is the remainder of a quotient."""
    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(wide.astype(np.float32), x.dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter computes what the GPU's multiply-add does")
def test_scales_are_those_of_a_division(monkeypatch):
    monkeypatch.setattr(triton_cast, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", exact_multiply_add)
    mantissas = torch.arange(0, 1 << 23, 61)[: 1 << 17]
    exponents = torch.tensor([28, 100, 127, 128, 180, 254])[torch.arange(1 << 17) % 6]
    amax = (mantissas | exponents << 23).int().view(torch.float32)
    amax[:4] = torch.tensor([1e-30, torch.inf, torch.nan, torch.finfo(torch.float32).max])
    factor, scale = torch.empty_like(amax), torch.empty_like(amax)
    scales_kernel[(len(amax) >> 15,)](amax, factor, scale, BLOCK=1 << 15)
    most = torch.full_like(amax, 448.0)
    assert factor.isnan().nonzero().tolist() == scale.isnan().nonzero().tolist() == [[2]]
    assert torch.equal(factor.nan_to_num(), (most / amax).nan_to_num())
    assert torch.equal(scale.nan_to_num(), (amax / most).nan_to_num())
