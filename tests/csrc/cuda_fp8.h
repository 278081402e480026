// e4m3 for cuda_runtime.h of this folder, from the format's definition: for tests only.
#pragma once

#include "cuda_runtime.h"

using __nv_fp8_storage_t = unsigned char;
using __nv_fp8x2_storage_t = unsigned short;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
struct __half_raw {
    unsigned short x;
};
struct alignas(4) __half2_raw {
    unsigned short x, y;
};
struct __half {
    unsigned short x;
    __half(__half_raw raw) : x(raw.x) {}
};
struct alignas(4) __half2 {
    __half_raw x, y;
    __half2(__half2_raw raw) : x{raw.x}, y{raw.y} {}
};

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t kind) {
    if (kind != __NV_E4M3) cuda_on_cpu::fail("only e4m3");
    if (x != x) return 0x7f;
    const unsigned char sign = std::signbit(x) ? 0x80 : 0;
    const float size = std::fabs(x);
    if (size >= 448.0f) return sign | 0x7e;
    // Steps of 2^-9 below 2^-6, of 2^(exponent - 3) above; nearbyint rounds ties to even.
    const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 0 .. 16
    return sign | static_cast<unsigned char>(steps + (exponent + 6) * 8);
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t s, __nv_fp8_interpretation_t kind) {
    return static_cast<unsigned short>(__nv_cvt_float_to_fp8(x.x, s, kind) | __nv_cvt_float_to_fp8(x.y, s, kind) << 8);
}
inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t code, __nv_fp8_interpretation_t) {
    const unsigned sign = (code & 0x80u) << 8, size = code & 0x7fu;
    if (size == 0x7f) return {static_cast<unsigned short>(sign | 0x7fff)};
    if (size >= 8) return {static_cast<unsigned short>(sign | ((size << 7) + (8u << 10)))};  // exponent bias 7 to 15
    static const unsigned short SUBNORMAL[8] = {0, 0x1800, 0x1c00, 0x1e00, 0x2000, 0x2100, 0x2200, 0x2300};  // n / 512
    return {static_cast<unsigned short>(sign | SUBNORMAL[size])};
}
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t x, __nv_fp8_interpretation_t kind) {
    return {__nv_cvt_fp8_to_halfraw(x & 0xff, kind).x, __nv_cvt_fp8_to_halfraw(x >> 8, kind).x};
}
inline float __half2float(__half x) {
    const int exponent = x.x >> 10 & 31, mantissa = x.x & 1023;
    float size = exponent == 31
                     ? (mantissa ? NAN : INFINITY)
                     : std::ldexp(exponent ? 1024.0f + mantissa : float(mantissa), std::max(exponent, 1) - 25);
    return x.x & 0x8000 ? -size : size;
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
