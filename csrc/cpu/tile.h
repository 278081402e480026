// The inner loop of every product here.
#pragma once

#include <algorithm>

#include "simd.h"

namespace r1 {

constexpr int64_t LANES = 16;   // columns of a tile
constexpr int64_t OUTPUTS = 6;  // rows of a tile: 12 sums, 2 operands and a weight fit the 16 registers of AVX2

// Where element (row, k) of a matrix is.
struct Matrix {
    const float* at;
    int64_t row, k;

    const float* from(int64_t first) const { return at + first * row; }
};

// out[o] = sum over k of weight[o, k] x[k, 0 .. 15], rows of x `step` apart.
template <int O>
R1_INLINE void tile(const float* x, int64_t step, Matrix weight, int64_t count, Float8 (*out)[2]) {
    Float8 total[O][2] = {};
    for (int64_t k = 0; k < count; ++k) {
        const Float8 low = load(x + k * step), high = load(x + k * step + 8);
#pragma GCC unroll 6
        for (int o = 0; o < O; ++o) {
            const Float8 w = all(weight.at[o * weight.row + k * weight.k]);
            total[o][0] += low * w;
            total[o][1] += high * w;
        }
    }
#pragma GCC unroll 6
    for (int o = 0; o < O; ++o) out[o][0] = total[o][0], out[o][1] = total[o][1];
}

// The same for up to OUTPUTS rows.
R1_INLINE void tiles(int64_t outputs, const float* x, int64_t step, Matrix weight, int64_t count, Float8 (*out)[2]) {
    if (outputs == OUTPUTS) return tile<OUTPUTS>(x, step, weight, count, out);
    int64_t o = 0;
    for (; o + 2 <= outputs; o += 2) {
        tile<2>(x, step, {weight.from(o), weight.row, weight.k}, count, out + o);
    }
    if (o < outputs) tile<1>(x, step, {weight.from(o), weight.row, weight.k}, count, out + o);
}

}  // namespace r1
