"""FP8 block quantization: every bit against an e4m3 table made by hand, and the checkpoint's layout."""

from __future__ import annotations

import math

import pytest
import torch

from r1kernels import fp8_dequantize, fp8_quantize
from r1kernels.fp8_cast.reference import to_e4m3

BLOCKS = [(1, 128), (128, 128)]
INF, NAN = float("inf"), float("nan")


def e4m3_value(code: int) -> float:
    """The number that a positive e4m3 code stands for: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    exponent, mantissa = code >> 3, code & 7
    return math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)


TABLE = [e4m3_value(code) for code in range(127)]  # code 127 is NaN


def nearest(x: float) -> int:
    """Code of the e4m3 value nearest to |x|, the even code of two equally near; its sign in bit 7."""
    code = min(range(127), key=lambda c: (abs(TABLE[c] - abs(x)), c & 1))
    return code | (0x80 if math.copysign(1.0, x) < 0 else 0)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Blocks of very different size, values of every exponent.
    x = torch.randn(*shape, generator=generator) * torch.exp(4 * torch.randn(*shape[:-1], 1, generator=generator))
    return x.to(dtype)


def test_the_cast_is_bit_exact():
    points = [x for a, b in zip(TABLE, [*TABLE[1:], 480.0], strict=True) for x in (a, (a + b) / 2)]
    points += [math.nextafter(x, way) for x in points for way in (-INF, INF)] + [1e-9, 449.0, 1e9]
    points += [-x for x in points]
    x = torch.tensor(points, dtype=torch.float32)
    found = to_e4m3(x).view(torch.uint8)
    assert found.tolist() == [nearest(value) for value in x.tolist()]  # x.tolist(): as rounded to float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_scales_are_bit_exact(dtype):
    x = random(3, 256, dtype=dtype)
    values, scale = fp8_quantize(x, block=(1, 128))
    for row, own_values, own_scale in zip(x, values.view(torch.uint8), scale, strict=True):
        for b in range(2):
            part = row[128 * b : 128 * (b + 1)].float()
            amax = part.abs().max()
            assert own_scale[b] == amax / 448
            scaled = (part * (torch.tensor(448.0) / amax)).tolist()
            assert own_values[128 * b : 128 * (b + 1)].tolist() == [nearest(v) for v in scaled]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(128, 128), (5, 256), (2, 130, 384), (0, 256), (3, 0, 128)])
def test_each_block_has_its_own_scale(block, shape):
    x = random(*shape)
    values, scale = fp8_quantize(x, block=block)
    assert values.shape == x.shape
    assert values.dtype == torch.float8_e4m3fn
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            tile = x[..., block[0] * i : block[0] * (i + 1), 128 * j : 128 * (j + 1)]
            assert torch.equal(scale[..., i, j], tile.abs().amax((-2, -1)) / 448)
    back = fp8_dequantize(values, scale, block=block, dtype=torch.float32)
    wide = scale.repeat_interleave(block[0], -2)[..., : shape[-2], :].repeat_interleave(128, -1)
    # Half a step: 1/16 of the value, or half the smallest subnormal 2^-9 of the scale.
    assert ((back - x).abs() <= (x.abs() / 16).maximum(wide * 2**-10) * (1 + 1e-6)).all()


def test_tiles_are_cut_at_the_edges():
    # kv_a_proj_with_mqa of DeepSeek-V3 is [576, 7168]: 5 x 56 scales.
    x = random(200, 130)
    values, scale = fp8_quantize(x, block=(128, 128))
    assert scale.shape == (2, 2)
    assert scale[1, 1] == x[128:, 128:].abs().max() / 448
    assert torch.equal(
        fp8_dequantize(values, scale, block=(128, 128), dtype=torch.float32)[:128, 128:].float(),
        values[:128, 128:].float() * scale[0, 1],
    )


def test_dequantize_by_hand_as_the_checkpoint_defines_it():
    # W = weight * weight_scale_inv: 3.5 * 0.25 and -448 * 2.
    values = torch.zeros(130, 128)
    values[0, 0], values[129, 5] = 3.5, -448.0
    scale = torch.tensor([[0.25], [2.0]])
    w = fp8_dequantize(values.to(torch.float8_e4m3fn), scale, block=(128, 128))
    assert w.dtype == torch.bfloat16
    assert (w[0, 0], w[129, 5], w.count_nonzero()) == (0.875, -896.0, 2)


@pytest.mark.parametrize("block", BLOCKS)
def test_quantizing_again_changes_nothing(block):
    # What a checkpoint needs: load, change nothing, save.
    values, scale = fp8_quantize(random(256, 256), block=block)
    back = fp8_dequantize(values, scale, block=block, dtype=torch.float32)
    again, scale_again = fp8_quantize(back, block=block)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
    torch.testing.assert_close(scale_again, scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", BLOCKS)
def test_zeros_tiny_and_huge_blocks(block):
    x = torch.zeros(128, 512)
    x[0, 128], x[0, 256], x[0, 384] = 1e-38, 3e38, 1e-25
    values, scale = fp8_quantize(x, block=block)
    assert scale[0].tolist() == pytest.approx([1e-30 / 448, 1e-30 / 448, 3e38 / 448, 1e-25 / 448])
    assert values[0, 128::128].float().tolist() == [0.0, 448.0, 448.0]
    assert not values[:, :256].float().any()
    assert fp8_dequantize(values, scale, block=block).isfinite().all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_block_with_an_infinity_or_nan_is_all_nan(block, bad):
    x = random(128, 256)
    x[7, 130] = bad
    back = fp8_dequantize(*fp8_quantize(x, block=block), block=block)
    is_bad = torch.zeros(128, 256, dtype=torch.bool)
    is_bad[7 if block[0] == 1 else slice(None), 128:] = True
    assert torch.equal(back.isnan(), is_bad)


def test_a_vector_is_one_row():
    x = random(1, 256)
    values, scale = fp8_quantize(x[0], block=(1, 128))
    assert scale.shape == (2,)
    assert torch.equal(
        fp8_dequantize(values, scale, block=(1, 128)),
        fp8_dequantize(*fp8_quantize(x, block=(1, 128)), block=(1, 128))[0],
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: fp8_quantize(torch.zeros(2, 128), block=(128, 1)),
            "block must be (1, 128) or (128, 128), got (128, 1)",
        ),
        (
            lambda: fp8_quantize(torch.zeros(2, 128).half(), block=(1, 128)),
            "x must be bfloat16 or float32, got torch.float16",
        ),
        (
            lambda: fp8_quantize(torch.zeros(2, 100), block=(1, 128)),
            "the last dimension of x must be divisible by 128 for block (1, 128), got 100",
        ),
        (
            lambda: fp8_quantize(torch.zeros(128), block=(128, 128)),
            "x must be contiguous with at least 2 dimensions for block (128, 128), got shape (128,) stride (1,)",
        ),
        (
            lambda: fp8_quantize(torch.zeros(128, 2).t(), block=(1, 128)),
            "x must be contiguous with at least 1 dimensions for block (1, 128), got shape (2, 128) stride (1, 2)",
        ),
        (
            lambda: fp8_quantize(torch.zeros(1, 128), block=(1, 128), impl="triton"),
            "impl='triton' does not exist; this op has cuda, reference",
        ),
    ],
)
def test_quantize_error(run, message):
    with pytest.raises(ValueError) as caught:
        run()
    assert str(caught.value) == f"fp8_quantize: {message}"


@pytest.mark.parametrize(
    ("values", "scale", "dtype", "message"),
    [
        (torch.zeros(2, 128), torch.ones(2, 1), torch.float32, "values must be torch.float8_e4m3fn, got torch.float32"),
        (
            to_e4m3(torch.zeros(2, 256)),
            torch.ones(2, 1),
            torch.float32,
            "scale must be contiguous float32 (2, 2) for values (2, 256) in blocks of (1, 128), "
            "got torch.float32 (2, 1)",
        ),
        (
            to_e4m3(torch.zeros(2, 128)),
            torch.ones(2, 1),
            torch.float16,
            "dtype must be torch.bfloat16 or torch.float32, got torch.float16",
        ),
    ],
)
def test_dequantize_error(values, scale, dtype, message):
    with pytest.raises(ValueError) as caught:
        fp8_dequantize(values, scale, block=(1, 128), dtype=dtype)
    assert str(caught.value) == f"fp8_dequantize: {message}"
