// What several functions do to one row.
#pragma once

#include <cmath>

#include "simd.h"

namespace r1 {

// 1 / sqrt(mean(x^2) + eps); `size` is a multiple of 8.
R1_INLINE float reciprocal_rms(const float* x, int64_t size, float eps) {
    Float8 squares = all(0.f);
    for (int64_t i = 0; i < size; i += 8) squares += load(x + i) * load(x + i);
    return 1.f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
}

R1_INLINE Float8 sigmoid(Float8 x) { return all(1.f) / (all(1.f) + exp(-x)); }

}  // namespace r1
