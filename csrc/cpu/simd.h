// Eight floats at a time, in the vector types of GCC and Clang: one source for AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

namespace r1 {

typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int8 __attribute__((vector_size(32)));

#define R1_INLINE inline __attribute__((always_inline))

R1_INLINE Float8 load(const float* from) {
    Float8 value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

R1_INLINE void store(float* to, Float8 value) { std::memcpy(to, &value, sizeof(value)); }

// Minus 0 changes nothing; GCC makes one broadcast of a number beside a vector, and seven inserts of a list of eight.
R1_INLINE Float8 all(float value) { return value - Float8{}; }

// The sums of four vectors.
R1_INLINE Float4 sums(Float8 a, Float8 b, Float8 c, Float8 d) {
    Float8 ab = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
                __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
    Float8 cd = __builtin_shufflevector(c, d, 0, 2, 8, 10, 4, 6, 12, 14) +
                __builtin_shufflevector(c, d, 1, 3, 9, 11, 5, 7, 13, 15);
    Float8 abcd = __builtin_shufflevector(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) +
                  __builtin_shufflevector(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
    return __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
}

R1_INLINE float sum(Float8 value) { return sums(value, value, value, value)[0]; }

R1_INLINE Float8 choose(Int8 mask, Float8 yes, Float8 no) {
    Int8 y, n;
    std::memcpy(&y, &yes, sizeof(y));
    std::memcpy(&n, &no, sizeof(n));
    Int8 bits = (mask & y) | (~mask & n);
    Float8 value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

R1_INLINE float most_of(Float8 value) {
    float largest = value[0];
    for (int i = 1; i < 8; ++i) largest = value[i] > largest ? value[i] : largest;
    return largest;
}

// e^x within 2 ulp: 2^n e^r with |r| <= ln(2) / 2, a Taylor polynomial of e^r. Below -87.3 it is 0, above 88.3 inf.
R1_INLINE Float8 exp(Float8 x) {
    const Float8 shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    Float8 clamped = choose(x < all(-87.3f), all(-87.3f), choose(x > all(88.3f), all(88.3f), x));
    Float8 n = (clamped * all(1.44269504f) + shift) - shift;
    Float8 r = clamped - n * all(0.693359375f) - n * all(-2.12194440e-4f);
    Float8 p = all(1.f / 5040);
    p = p * r + all(1.f / 720);
    p = p * r + all(1.f / 120);
    p = p * r + all(1.f / 24);
    p = p * r + all(1.f / 6);
    p = p * r + all(0.5f);
    p = p * r + all(1.f);
    p = p * r + all(1.f);
    Int8 bits = (__builtin_convertvector(n, Int8) + 127) << 23;
    Float8 scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    Float8 value = p * scale;
    value = choose(x < all(-87.3f), all(0.f), value);
    value = choose(x > all(88.3f), all(__builtin_inff()), value);
    return choose(x != x, x, value);
}

}  // namespace r1
