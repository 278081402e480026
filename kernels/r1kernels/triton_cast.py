"""Rounding float32 to a narrower float inside Triton kernels, alike on a GPU and under Triton's interpreter.

The interpreter cuts bfloat16 off instead of rounding it and loses the carry of e4m3, so it gets integer routines here.
Everything else in a kernel is to be float32: the interpreter's arithmetic in bfloat16 is wrong as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 values rounded to the nearest of `dtype`, ties to even.

    float8e4nv (torch.float8_e4m3fn) saturates: beyond +-448 it is +-448, infinity too. NaN stays NaN. It needs a GPU
    of compute capability 8.9 or later.

    Args:
        x:     block of float32.
        dtype: tl.float32, tl.float16, tl.bfloat16 or tl.float8e4nv.
    """
    tl.static_assert(x.dtype == tl.float32, "round_to takes float32")
    if INTERPRETED:
        if dtype == tl.bfloat16:
            return _interpreted_bfloat16(x)
        elif dtype == tl.float8e4nv:
            return _interpreted_e4m3(x)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def e4m3_scales(amax):
    """(448 / amax, amax / 448), both rounded to nearest as a division is, for amax of 1e-30 or more.

    A division of the hardware's keeps a slow path for the ends of the range, which costs registers and branches. Here
    the quotient of an approximate reciprocal is corrected by its remainder, which a fused multiply-add gives exactly
    (Markstein); amax is brought to where nothing underflows.
    """
    if INTERPRETED:  # whose multiply-add rounds twice
        most = tl.full(amax.shape, 448.0, tl.float32)
        return tl.div_rn(most, amax), tl.div_rn(amax, most)
    else:
        shrink = tl.where(amax > 1.0, 5.421010862427522e-20, 1.0)  # 2**-64
        near = amax * shrink
        inverse = 1.0 / near
        inverse = tl.fma(inverse, tl.fma(-near, inverse, 1.0), inverse)
        factor = 448.0 * inverse
        factor = tl.fma(tl.fma(-near, factor, 448.0), inverse, factor) * shrink
        scale = amax * 0.0022321429569274187  # 1 / 448 in float32
        scale = tl.fma(tl.fma(-scale, 448.0, amax), 0.0022321429569274187, scale)
        # The remainder of infinity is NaN.
        is_infinite = amax == float("inf")
        return tl.where(is_infinite, 0.0, factor), tl.where(is_infinite, amax, scale)


@triton.jit
def _interpreted_bfloat16(x):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # the carry could turn NaN into infinity
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _interpreted_e4m3(x):
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    size_bits = size.to(tl.uint32, bitcast=True)
    # 3 of the 23 bits of the mantissa stay; the exponent's bias goes from 127 to 7.
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 the values are multiples of 2**-9: adding 2**23 rounds to whole ones, ties to even.
    subnormal = (size * 512.0 + 8388608.0 - 8388608.0).to(tl.uint32)
    code = tl.where(size < 0.015625, subnormal, normal)
    code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
