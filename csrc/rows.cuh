// Rows of bfloat16 or float32 in registers: 16-byte loads and stores, sums over a warp, and quantization to e4m3 in
// blocks of 128 as kernels/r1kernels/fp8_cast/reference.py defines it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "launch.h"

constexpr float E4M3_MAX = 448.0f;
constexpr float AMAX_FLOOR = 1e-30f;

__device__ inline void unpack(uint4 x, float* v) {
    const unsigned words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ inline unsigned pack2(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    unsigned word;
    memcpy(&word, &pair, 4);
    return word;
}

__device__ inline uint4 pack8(const float* v) {
    return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}

__device__ inline void load8(const __nv_bfloat16* from, float* v) {
    unpack(__ldg(reinterpret_cast<const uint4*>(from)), v);
}

__device__ inline void load16(const __nv_bfloat16* from, float* v) {
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(from));
    const uint4 high = __ldg(reinterpret_cast<const uint4*>(from) + 1);
    unpack(low, v);
    unpack(high, v + 8);
}

__device__ inline void load16(const float* from, float* v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 x = __ldg(reinterpret_cast<const float4*>(from) + i);
        v[4 * i] = x.x;
        v[4 * i + 1] = x.y;
        v[4 * i + 2] = x.z;
        v[4 * i + 3] = x.w;
    }
}

__device__ inline void store16(__nv_bfloat16* to, const float* v) {
    reinterpret_cast<uint4*>(to)[0] = pack8(v);
    reinterpret_cast<uint4*>(to)[1] = pack8(v + 8);
}

__device__ inline void store16(float* to, const float* v) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        reinterpret_cast<float4*>(to)[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float x) { return x; }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ inline void store(float* to, float x) { *to = x; }

// The order of the additions is fixed.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// |x| as bits: they order like the numbers, and a NaN is above all of them, so that its block shows it.
template <int N>
__device__ inline unsigned amax_bits(const float* v) {
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
    return most;
}

// Over neighbouring lanes, `lanes` a power of two: 8 lanes of 16 values are a block of 128.
template <int LANES>
__device__ inline unsigned max_of_lanes(unsigned x) {
#pragma unroll
    for (int lanes = LANES / 2; lanes; lanes /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

struct BlockScale {
    float scale;    // amax / 448
    float inverse;  // 448 / amax

    __device__ explicit BlockScale(unsigned bits) {
        const float amax = __uint_as_float(max(bits, __float_as_uint(AMAX_FLOOR)));
        scale = amax / E4M3_MAX;
        inverse = E4M3_MAX / amax;
    }
};

__device__ inline unsigned quantize4(float a, float b, float c, float d) {
    const unsigned low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
    const unsigned high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

__device__ inline uint4 quantize16(const float* v, float inverse) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] =
            quantize4(v[4 * i] * inverse, v[4 * i + 1] * inverse, v[4 * i + 2] * inverse, v[4 * i + 3] * inverse);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ inline float e4m3_to_float(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

__device__ inline void dequantize16(uint4 codes, float scale, float* v) {
    const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> 16 * (i % 2) & 0xffffu);
        const float2 x = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
        v[2 * i] = x.x * scale;
        v[2 * i + 1] = x.y * scale;
    }
}
