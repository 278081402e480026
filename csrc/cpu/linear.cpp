// Products of rows with weights, with what stands before and after them.
//
// Activations are in panels of 16 rows, [panels, size, 16], so that a vector holds the same column of 8 rows: nothing
// is summed across a vector, and the weights are read as they are, one number for 16 rows. BLAS copies them into
// another layout first, which is too much for a few rows and is not needed for many. Each output is summed in the order
// of its columns: a row's result is the same in every bit whatever rows are computed with it.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "rows.h"
#include "tile.h"

namespace r1 {

constexpr int64_t PANEL = LANES;    // rows
constexpr int64_t BLOCK = 12;       // outputs of a piece of work: their weights and a panel fit a level-1 cache
constexpr int64_t CHUNK = 1 << 17;  // numbers of its rows: half of a level-2 cache; and
constexpr int64_t LEAST = 8;        // panels, for which the weights come from memory once

enum Ending : int64_t { ROWS, ADD, GATE };  // out [rows, outputs] = y; panels += y; panels = silu(y) * second half

struct Product {
    const float *x, *weight, *bias;
    float* out;
    int64_t rows, size, outputs;  // outputs: columns of `out`
    Ending ending;
};

// Outputs [first, first + BLOCK) of rows [begin, end).
void block(const Product& p, int64_t first, int64_t begin, int64_t end) {
    const int64_t last = std::min(first + BLOCK, p.outputs);
    for (int64_t row = begin; row < end; row += PANEL) {
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

void normalize_all(const Team& team, const float* x, const float* weight, float* out, int64_t rows, int64_t size,
                   float eps) {
    parallel(team, (rows + PANEL - 1) / PANEL, [&](int64_t panel) {
        const int64_t at = panel * PANEL * size;
        normalize(x + at, weight, eps, size, out + at);
    });
}

}  // namespace r1

// out = x / sqrt(mean(x^2) + eps) * weight; x and out [panels, size, 16].
R1_EXPORT void r1_cpu_panel_norm(r1::RunTeam run, int64_t threads, const float* x, const float* weight, float* out,
                                 int64_t rows, int64_t size, float eps) {
    r1::normalize_all({run, threads}, x, weight, out, rows, size, eps);
}

// norm(x) weight^T + bias, handed on as Ending says; norm(x) as of r1_cpu_panel_norm, or x where norm_weight is null. x
// and scratch (used where there is a norm) [panels, size, 16]; weight [outputs, size], with a gate [2 * outputs, size];
// bias [outputs] or null; out [rows, outputs] or [panels, outputs, 16].
R1_EXPORT void r1_cpu_panel_linear(r1::RunTeam run, int64_t threads, const float* x, const float* norm_weight,
                                   const float* weight, const float* bias, float* scratch, float* out, int64_t rows,
                                   int64_t size, int64_t outputs, int64_t ending, float eps) {
    const r1::Team team{run, threads};
    if (norm_weight) {
        r1::normalize_all(team, x, norm_weight, scratch, rows, size, eps);
        x = scratch;
    }
    const r1::Product product{x, weight, bias, out, rows, size, outputs, static_cast<r1::Ending>(ending)};
    const int64_t blocks = (outputs + r1::BLOCK - 1) / r1::BLOCK;
    const int64_t chunk = std::max(r1::CHUNK / (r1::PANEL * size), r1::LEAST) * r1::PANEL;
    r1::parallel(team, (rows + chunk - 1) / chunk * blocks, [&](int64_t piece) {
        const int64_t begin = piece / blocks * chunk;
        r1::block(product, piece % blocks * r1::BLOCK, begin, std::min(begin + chunk, rows));
    });
}
