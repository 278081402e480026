// Attention of a decode step: every row has one new token, which goes into the cache and looks at all before it.
#include <algorithm>
#include <vector>

#include "export.h"
#include "rows.h"

namespace r1 {

struct Step {
    const float *qkv, *query_norm, *key_norm, *rotations;
    const int64_t* positions;
    float *keys, *values, *out;
    int64_t heads, kv_heads, size, capacity;
    float scale, eps;
};

// Normalizes (where weight is not null) and turns one head; neighbours are a pair. `rotation`: cos and sin in turn.
R1_INLINE void turn(const float* x, const float* weight, const float* rotation, int64_t size, float eps, float scale,
                    float* out) {
    const Float8 factor = all(weight ? scale * reciprocal_rms(x, size, eps) : scale), ones = all(1.f);
    for (int64_t i = 0; i < size; i += 8) {
        const Float8 value = load(x + i) * factor * (weight ? load(weight + i) : ones), angle = load(rotation + i);
        const Float8 swapped = __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6);
        const Float8 cosine = __builtin_shufflevector(angle, angle, 0, 0, 2, 2, 4, 4, 6, 6);
        const Float8 sine = __builtin_shufflevector(angle, angle, 1, 1, 3, 3, 5, 5, 7, 7);
        store(out + i, value * cosine + swapped * sine * Float8{-1, 1, -1, 1, -1, 1, -1, 1});
    }
}

// scores[t] = query . key t
R1_INLINE void score(const float* query, const float* keys, int64_t length, int64_t size, float* scores) {
    for (int64_t t = 0; t < length; t += 4) {
        // At the end of the cache's row the last key stands for those that are not there.
        const int64_t last = length - 1 - t;
        const float* key = keys + t * size;
        const float *k1 = key + std::min<int64_t>(1, last) * size, *k2 = key + std::min<int64_t>(2, last) * size,
                    *k3 = key + std::min<int64_t>(3, last) * size;
        Float8 a = all(0.f), b = a, c = a, d = a;
        for (int64_t i = 0; i < size; i += 8) {
            const Float8 q = load(query + i);
            a += q * load(key + i), b += q * load(k1 + i), c += q * load(k2 + i), d += q * load(k3 + i);
        }
        const Float4 four = sums(a, b, c, d);
        std::memcpy(scores + t, &four, sizeof(four));
    }
}

// out[i * 16] = sum over t of weights[t] values[t][i] / total, N vectors of 8 at once.
template <int N>
R1_INLINE void mix(const float* weights, const float* values, int64_t length, int64_t size, float total, float* out) {
    Float8 sums[N] = {};
    for (int64_t t = 0; t < length; ++t) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[n] += all(weights[t]) * load(values + t * size + 8 * n);
    }
    for (int n = 0; n < N; ++n) {
        const Float8 value = sums[n] / all(total);
        for (int i = 0; i < 8; ++i) out[(8 * n + i) * 16] = value[i];
    }
}

// One key head of one row, and the query heads that share it.
void attend(const Step& s, int64_t row, int64_t head, float* query, float* scores) {
    const int64_t group = s.heads / s.kv_heads, length = s.positions[row] + 1;
    const float* qkv = s.qkv + row * (s.heads + 2 * s.kv_heads) * s.size;
    const float* rotation = s.rotations + s.positions[row] * s.size;
    float* keys = s.keys + (row * s.kv_heads + head) * s.capacity * s.size;
    float* values = s.values + (row * s.kv_heads + head) * s.capacity * s.size;
    turn(qkv + (s.heads + head) * s.size, s.key_norm, rotation, s.size, s.eps, 1.f, keys + (length - 1) * s.size);
    std::memcpy(values + (length - 1) * s.size, qkv + (s.heads + s.kv_heads + head) * s.size, s.size * sizeof(float));
    for (int64_t g = head * group; g < (head + 1) * group; ++g) {
        turn(qkv + g * s.size, s.query_norm, rotation, s.size, s.eps, s.scale, query);
        score(query, keys, length, s.size, scores);
        const float total = exponentials(scores, length, (length + 7) / 8 * 8, 1.f);
        float* out = s.out + (row / 16 * s.heads * s.size + g * s.size) * 16 + row % 16;
        int64_t i = 0;
        for (; i + 64 <= s.size; i += 64) mix<8>(scores, values + i, length, s.size, total, out + i * 16);
        for (; i + 32 <= s.size; i += 32) mix<4>(scores, values + i, length, s.size, total, out + i * 16);
        for (; i < s.size; i += 8) mix<1>(scores, values + i, length, s.size, total, out + i * 16);
    }
}

}  // namespace r1

// Writes key and value of the new token of each row at its position, then out = softmax(scale q k^T) v over all up to
// it.
//   qkv [rows, heads + 2 * kv_heads, size]; query_norm, key_norm [size] or null; rotations [capacity, size / 2]
//   complex; positions [rows]; keys, values [rows, kv_heads, capacity, size]; out [panels, heads * size, 16], see
//   linear.cpp. size is a multiple of 8.
R1_EXPORT void r1_cpu_decode_attention(r1::RunTeam run, int64_t threads, const float* qkv, const float* query_norm,
                                       const float* key_norm, const float* rotations, const int64_t* positions,
                                       float* keys, float* values, float* out, int64_t rows, int64_t heads,
                                       int64_t kv_heads, int64_t size, int64_t capacity, float scale, float eps) {
    const r1::Step step{qkv, query_norm, key_norm, rotations, positions, keys,  values,
                        out, heads,      kv_heads, size,      capacity,  scale, eps};
    r1::parallel(r1::Team{run, threads}, rows, [&](int64_t row) {
        thread_local std::vector<float> scratch;
        scratch.resize(size + (positions[row] / 8 + 1) * 8);
        for (int64_t head = 0; head < kv_heads; ++head) {
            r1::attend(step, row, head, scratch.data(), scratch.data() + size);
        }
    });
}
