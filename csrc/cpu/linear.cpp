// Products of a few rows with weights, as a decode step has them, with what stands before and after them.
//
// Activations are in panels of 16 rows, [panels, size, 16], so that a vector holds the same column of 8 rows: nothing
// is summed across a vector, and the weights are read as they are, one number for 16 rows. BLAS copies them into
// another layout first, which pays for many rows only. Each output is summed in the order of its columns: a row's
// result is the same in every bit whatever rows are computed with it.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "rows.h"
#include "tile.h"

namespace r1 {

constexpr int64_t PANEL = LANES;  // rows
constexpr int64_t BLOCK = 12;     // outputs of a piece of work: their weights and a panel fit a level-1 cache

enum Ending : int64_t { ROWS, ADD, GATE };  // out [rows, outputs] = y; panels += y; panels = silu(y) * second half

struct Product {
    const float *x, *weight, *bias;
    float* out;
    int64_t rows, size, outputs;  // outputs: columns of `out`
    Ending ending;
};

// Outputs [first, first + BLOCK) of all rows.
void block(const Product& p, int64_t first) {
    const int64_t last = std::min(first + BLOCK, p.outputs);
    for (int64_t row = 0; row < p.rows; row += PANEL) {
        const float* x = p.x + row * p.size;
        for (int64_t at = first; at < last; at += OUTPUTS) {
            const int64_t outputs = std::min(OUTPUTS, last - at);
            Float8 out[OUTPUTS][2], up[OUTPUTS][2];
            tiles(outputs, x, PANEL, {p.weight + at * p.size, p.size, 1}, p.size, out);
            if (p.ending == GATE)
                tiles(outputs, x, PANEL, {p.weight + (p.outputs + at) * p.size, p.size, 1}, p.size, up);
            for (int64_t o = 0; o < outputs; ++o) {
                for (int half = 0; half < 2; ++half) {
                    Float8& value = out[o][half];
                    value += all(p.bias ? p.bias[at + o] : 0.f);
                    if (p.ending == GATE) value *= sigmoid(value) * up[o][half];
                    if (p.ending == ROWS) continue;
                    float* to = p.out + row * p.outputs + (at + o) * PANEL + 8 * half;
                    store(to, p.ending == ADD ? load(to) + value : value);
                }
            }
            if (p.ending != ROWS) continue;
            float values[OUTPUTS * PANEL];
            std::memcpy(values, out, outputs * PANEL * sizeof(float));
            for (int64_t r = 0; r < std::min(PANEL, p.rows - row); ++r) {
                float* to = p.out + (row + r) * p.outputs + at;
                for (int64_t o = 0; o < outputs; ++o) to[o] = values[o * PANEL + r];
            }
        }
    }
}

// The rows of a panel over the root of their mean square, times weight.
void normalize(const float* x, const float* weight, float eps, int64_t size, float* out) {
    for (int64_t half = 0; half < PANEL; half += 8) {
        Float8 scale = all(0.f);
        for (int64_t i = 0; i < size; ++i) scale += load(x + i * PANEL + half) * load(x + i * PANEL + half);
        for (int r = 0; r < 8; ++r) scale[r] = 1.f / std::sqrt(scale[r] / static_cast<float>(size) + eps);
        for (int64_t i = 0; i < size; ++i) {
            store(out + i * PANEL + half, load(x + i * PANEL + half) * scale * all(weight[i]));
        }
    }
}

}  // namespace r1

// norm(x) weight^T + bias, handed on as Ending says; norm(x) = x / sqrt(mean(x^2) + eps) * norm_weight, or x where
// norm_weight is null. x and scratch (used where there is a norm) [panels, size, 16]; weight [outputs, size], with a
// gate [2 * outputs, size]; bias [outputs] or null; out [rows, outputs] or [panels, outputs, 16].
R1_EXPORT void r1_cpu_panel_linear(r1::RunTeam run, int64_t threads, const float* x, const float* norm_weight,
                                   const float* weight, const float* bias, float* scratch, float* out, int64_t rows,
                                   int64_t size, int64_t outputs, int64_t ending, float eps) {
    const r1::Team team{run, threads};
    if (norm_weight) {
        r1::parallel(team, (rows + r1::PANEL - 1) / r1::PANEL, [&](int64_t panel) {
            const int64_t at = panel * r1::PANEL * size;
            r1::normalize(x + at, norm_weight, eps, size, scratch + at);
        });
        x = scratch;
    }
    const r1::Product product{x, weight, bias, out, rows, size, outputs, static_cast<r1::Ending>(ending)};
    r1::parallel(team, (outputs + r1::BLOCK - 1) / r1::BLOCK,
                 [&](int64_t piece) { r1::block(product, piece * r1::BLOCK); });
}
