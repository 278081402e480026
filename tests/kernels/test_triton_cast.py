"""round_to against torch's casts, bit for bit, under the interpreter; on a GPU the same test runs compiled."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from r1kernels.triton_cast import round_to

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
