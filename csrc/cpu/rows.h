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

// scores[0, length) become e^(scale (score - largest)), those up to `padded`, a multiple of 8, zeros; returns their
// sum.
R1_INLINE float exponentials(float* scores, int64_t length, int64_t padded, float scale) {
    for (int64_t t = length; t < padded; ++t) scores[t] = -__builtin_inff();
    Float8 most = load(scores), total = all(0.f);
    for (int64_t t = 8; t < padded; t += 8) most = choose(load(scores + t) > most, load(scores + t), most);
    const Float8 largest = all(most_of(most) * scale);
    for (int64_t t = 0; t < padded; t += 8) {
        const Float8 weight = exp(load(scores + t) * all(scale) - largest);
        store(scores + t, weight);
        total += weight;
    }
    return sum(total);
}

}  // namespace r1
