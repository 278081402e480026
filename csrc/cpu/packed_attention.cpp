// Causal attention within each sequence of a packed row, forward and backward, without padding.
//
// A piece of work is one sequence and one key head with the query heads that share it. The attention weights of a block
// of queries are made whenever they are needed, from queries and keys alone; nothing of the square is kept.
#include <algorithm>
#include <vector>

#include "export.h"
#include "rows.h"
#include "tile.h"

namespace r1 {

constexpr int64_t BLOCK = 8 * OUTPUTS;  // queries

// q, out and their gradients [T, heads, size]; k, v and theirs [T, kv_heads, size].
struct Attention {
    const float *q, *k, *v, *grad;
    float *out, *grad_q, *grad_k, *grad_v;
    int64_t heads, kv_heads, size;
    float scale;
};

// Keys and values of one sequence and key head, transposed: [size, padded], zeros behind the last.
struct Transposed {
    std::vector<float> keys, values;
    int64_t padded;
};

void transpose(const float* x, int64_t step, int64_t length, int64_t size, int64_t padded, std::vector<float>& out) {
    out.assign(size * padded, 0.f);
    for (int64_t t = 0; t < length; ++t) {
        for (int64_t i = 0; i < size; ++i) out[i * padded + t] = x[t * step + i];
    }
}

// out[rows, columns] (+)= weight[rows, count] x[count, columns]; columns are a multiple of 16.
template <bool ADDS>
R1_INLINE void multiply(Matrix weight, const float* x, int64_t step, float* out, int64_t out_step, int64_t rows,
                        int64_t columns, int64_t count) {
    for (int64_t row = 0; row < rows; row += OUTPUTS) {
        const int64_t outputs = std::min(OUTPUTS, rows - row);
        for (int64_t column = 0; column < columns; column += LANES) {
            Float8 sums[OUTPUTS][2];
            tiles(outputs, x + column, step, {weight.from(row), weight.row, weight.k}, count, sums);
            for (int64_t o = 0; o < outputs; ++o) {
                float* to = out + (row + o) * out_step + column;
                for (int half = 0; half < 2; ++half) {
                    const Float8 value = sums[o][half];
                    store(to + 8 * half, ADDS ? load(to + 8 * half) + value : value);
                }
            }
        }
    }
}

// weights[0, padded): softmax(scale * scores) over the first `length`, then zeros.
R1_INLINE void softmax(float* scores, int64_t length, int64_t padded, float scale) {
    const Float8 factor = all(1.f / exponentials(scores, length, padded, scale));
    for (int64_t t = 0; t < padded; t += 8) store(scores + t, load(scores + t) * factor);
}

// The weights [rows, padded] of queries [first, first + rows) of a sequence; returns the columns that are not all 0.
R1_INLINE int64_t weigh(const float* q, int64_t step, const Transposed& sequence, int64_t first, int64_t rows,
                        int64_t size, float scale, float* weights) {
    const int64_t columns = std::min((first + rows + LANES - 1) / LANES * LANES, sequence.padded);
    multiply<false>({q, step, 1}, sequence.keys.data(), sequence.padded, weights, sequence.padded, rows, columns, size);
    for (int64_t r = 0; r < rows; ++r) softmax(weights + r * sequence.padded, first + r + 1, columns, scale);
    return columns;
}

void forward(const Attention& a, int64_t start, int64_t length, int64_t head, Transposed& sequence,
             std::vector<float>& weights) {
    const int64_t group = a.heads / a.kv_heads, step = a.heads * a.size, kv_step = a.kv_heads * a.size;
    const int64_t at = start * kv_step + head * a.size;
    transpose(a.k + at, kv_step, length, a.size, sequence.padded, sequence.keys);
    weights.resize(BLOCK * sequence.padded);
    for (int64_t g = head * group; g < (head + 1) * group; ++g) {
        for (int64_t first = 0; first < length; first += BLOCK) {
            const int64_t rows = std::min(BLOCK, length - first), query = (start + first) * step + g * a.size;
            weigh(a.q + query, step, sequence, first, rows, a.size, a.scale, weights.data());
            multiply<false>({weights.data(), sequence.padded, 1}, a.v + at, kv_step, a.out + query, step, rows, a.size,
                            std::min(first + rows, length));
        }
    }
}

// With P the weights and dP = grad v^T: dS = P (dP - sum over keys of P dP), dq = dS k, dk = dS^T q, dv = P^T grad.
void backward(const Attention& a, int64_t start, int64_t length, int64_t head, Transposed& sequence,
              std::vector<float>& weights, std::vector<float>& slopes) {
    const int64_t group = a.heads / a.kv_heads, step = a.heads * a.size, kv_step = a.kv_heads * a.size;
    const int64_t at = start * kv_step + head * a.size, padded = sequence.padded;
    transpose(a.k + at, kv_step, length, a.size, padded, sequence.keys);
    transpose(a.v + at, kv_step, length, a.size, padded, sequence.values);
    weights.resize(BLOCK * padded);
    slopes.resize(BLOCK * padded);
    for (int64_t g = head * group; g < (head + 1) * group; ++g) {
        for (int64_t first = 0; first < length; first += BLOCK) {
            const int64_t rows = std::min(BLOCK, length - first), query = (start + first) * step + g * a.size;
            const int64_t keys = std::min(first + rows, length);
            const int64_t columns = weigh(a.q + query, step, sequence, first, rows, a.size, a.scale, weights.data());
            multiply<false>({a.grad + query, step, 1}, sequence.values.data(), padded, slopes.data(), padded, rows,
                            columns, a.size);
            for (int64_t r = 0; r < rows; ++r) {
                float *p = weights.data() + r * padded, *slope = slopes.data() + r * padded;
                Float8 mean = all(0.f);
                for (int64_t t = 0; t < columns; t += 8) mean += load(p + t) * load(slope + t);
                const Float8 shift = all(sum(mean)), scale = all(a.scale);
                for (int64_t t = 0; t < columns; t += 8) {
                    store(slope + t, load(p + t) * (load(slope + t) - shift) * scale);
                }
            }
            multiply<false>({slopes.data(), padded, 1}, a.k + at, kv_step, a.grad_q + query, step, rows, a.size, keys);
            multiply<true>({slopes.data(), 1, padded}, a.q + query, step, a.grad_k + at, kv_step, keys, a.size, rows);
            multiply<true>({weights.data(), 1, padded}, a.grad + query, step, a.grad_v + at, kv_step, keys, a.size,
                           rows);
        }
    }
}

// Calls body(start, length, head, sequence) for every sequence and key head.
template <class Body>
void over_sequences(const Team& team, const int64_t* borders, int64_t sequences, int64_t kv_heads, const Body& body) {
    parallel(team, sequences * kv_heads, [&](int64_t piece) {
        const int64_t start = borders[piece / kv_heads], length = borders[piece / kv_heads + 1] - start;
        thread_local Transposed sequence;
        sequence.padded = (length + LANES - 1) / LANES * LANES;
        body(start, length, piece % kv_heads, sequence);
    });
}

}  // namespace r1

// out = softmax(scale q k^T) v of every query, over the keys up to its own place in its sequence.
//   q, out [T, heads, size]; k, v [T, kv_heads, size]; borders [sequences + 1]: the first token of each, then T.
//   size is a multiple of 16.
R1_EXPORT void r1_cpu_packed_attention(r1::RunTeam run, int64_t threads, const float* q, const float* k, const float* v,
                                       const int64_t* borders, float* out, int64_t sequences, int64_t heads,
                                       int64_t kv_heads, int64_t size, float scale) {
    const r1::Attention a{q, k, v, nullptr, out, nullptr, nullptr, nullptr, heads, kv_heads, size, scale};
    r1::over_sequences({run, threads}, borders, sequences, kv_heads,
                       [&](int64_t start, int64_t length, int64_t head, r1::Transposed& sequence) {
                           thread_local std::vector<float> weights;
                           r1::forward(a, start, length, head, sequence, weights);
                       });
}

// The gradients for `grad` of out; grad_k and grad_v start as zeros.
R1_EXPORT void r1_cpu_packed_attention_backward(r1::RunTeam run, int64_t threads, const float* q, const float* k,
                                                const float* v, const float* grad, const int64_t* borders,
                                                float* grad_q, float* grad_k, float* grad_v, int64_t sequences,
                                                int64_t heads, int64_t kv_heads, int64_t size, float scale) {
    const r1::Attention a{q, k, v, grad, nullptr, grad_q, grad_k, grad_v, heads, kv_heads, size, scale};
    r1::over_sequences({run, threads}, borders, sequences, kv_heads,
                       [&](int64_t start, int64_t length, int64_t head, r1::Transposed& sequence) {
                           thread_local std::vector<float> weights, slopes;
                           r1::backward(a, start, length, head, sequence, weights, slopes);
                       });
}
