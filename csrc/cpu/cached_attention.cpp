// Attention of new tokens, which go into a cache and look at all before them: one of each sequence in a decode step,
// all of a prompt, those that follow a prefix.
//
// The result of a token is the same in every bit whichever of these it is, and whatever tokens are computed with it:
// its keys are taken in the order of the sequence, and its sums have one order.
#include <algorithm>
#include <vector>

#include "export.h"
#include "rows.h"

namespace r1 {

constexpr int64_t QUERIES = 16;  // of a piece of work, the heads of each token counted: they read keys and values once
constexpr int64_t CHUNK = 4096;  // numbers of as many keys as a level-1 cache holds beside what meets them

struct NewTokens {
    const float *qkv, *query_norm, *key_norm, *rotations;
    const int64_t *positions, *rows, *places, *pasts;
    float *keys, *values, *out;
    int64_t heads, kv_heads, size, capacity;
    float scale, eps;

    int64_t group() const { return heads / kv_heads; }
    int64_t head_at(int64_t row, int64_t head) const { return (row * kv_heads + head) * capacity * size; }
    const float* qkv_at(int64_t token, int64_t head) const {
        return qkv + (token * (heads + 2 * kv_heads) + head) * size;
    }
};

// Tokens [first, last) of one row.
struct Run {
    int64_t first, last;
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

// scores[q][t] = query q . key t, of Q queries; scores are `step` apart.
template <int Q>
R1_INLINE void score(const float* query, const float* keys, int64_t length, int64_t size, float* scores, int64_t step) {
    for (int64_t t = 0; t < length; t += 4) {
        // The last key stands for those that are not there.
        const int64_t last = length - 1 - t;
        const float* key = keys + t * size;
        const float *k1 = key + std::min<int64_t>(1, last) * size, *k2 = key + std::min<int64_t>(2, last) * size,
                    *k3 = key + std::min<int64_t>(3, last) * size;
        Float8 total[Q][4] = {};
        for (int64_t i = 0; i < size; i += 8) {
            const Float8 a = load(key + i), b = load(k1 + i), c = load(k2 + i), d = load(k3 + i);
            for (int q = 0; q < Q; ++q) {
                const Float8 of = load(query + q * size + i);
                total[q][0] += of * a, total[q][1] += of * b, total[q][2] += of * c, total[q][3] += of * d;
            }
        }
        for (int q = 0; q < Q; ++q) {
            const Float4 four = sums(total[q][0], total[q][1], total[q][2], total[q][3]);
            std::memcpy(scores + q * step + t, &four, sizeof(four));
        }
    }
}

// out[q][i] += sum over t of weights[q][t] values[t][i], of Q queries, N vectors of 8 at once.
template <int Q, int N>
R1_INLINE void mix(const float* weights, int64_t step, const float* values, int64_t length, int64_t size, float* out) {
    Float8 sums[Q][N];
    for (int q = 0; q < Q; ++q) {
        for (int n = 0; n < N; ++n) sums[q][n] = load(out + q * size + 8 * n);
    }
    for (int64_t t = 0; t < length; ++t) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const Float8 value = load(values + t * size + 8 * n);
            for (int q = 0; q < Q; ++q) sums[q][n] += all(weights[q * step + t]) * value;
        }
    }
    for (int q = 0; q < Q; ++q) {
        for (int n = 0; n < N; ++n) store(out + q * size + 8 * n, sums[q][n]);
    }
}

// The same of all columns.
template <int Q>
R1_INLINE void mix(const float* weights, int64_t step, const float* values, int64_t length, int64_t size, float* out) {
    constexpr int N = 8 / Q;
    int64_t i = 0;
    for (; i + 8 * N <= size; i += 8 * N) mix<Q, N>(weights, step, values + i, length, size, out + i);
    for (; i < size; i += 8) mix<Q, 1>(weights, step, values + i, length, size, out + i);
}

// Key and value of a token go to their place.
void keep(const NewTokens& s, int64_t token) {
    const float* rotation = s.rotations + s.positions[token] * s.size;
    for (int64_t head = 0; head < s.kv_heads; ++head) {
        const int64_t at = s.head_at(s.rows[token], head) + s.places[token] * s.size;
        turn(s.qkv_at(token, s.heads + head), s.key_norm, rotation, s.size, s.eps, 1.f, s.keys + at);
        std::memcpy(s.values + at, s.qkv_at(token, s.heads + s.kv_heads + head), s.size * sizeof(float));
    }
}

// Of the places [from, until) of a row those that a token sees: the first `prefix`, and `count` from `own` on, which
// are those from `index` on of its sequence.
struct Seen {
    int64_t prefix, own, count, index;

    bool operator==(const Seen& other) const {
        return prefix == other.prefix && own == other.own && count == other.count && index == other.index;
    }
};

Seen seen(const NewTokens& s, int64_t token, int64_t from, int64_t until) {
    const int64_t past = s.pasts[token], skipped = s.places[token] - s.positions[token];
    const int64_t own = std::max(from, past + skipped);
    return {std::min(until, past) - from, own, std::min(until, s.places[token] + 1) - own, own - skipped};
}

// Calls body(tokens, key, count, index) for all tokens of a run and the keys that they see, `count` of them from place
// `key` of the row on, which are those from `index` on of their sequences: a chunk of the row for all of them, then the
// next. Neighbours that see the same of a chunk are taken together.
template <class Body>
void over_keys(const NewTokens& s, const Run& run, const Body& body) {
    const int64_t end = *std::max_element(s.places + run.first, s.places + run.last) + 1;
    const int64_t step = std::max<int64_t>(CHUNK / s.size, 1);
    for (int64_t from = 0; from < end; from += step) {
        for (Run alike{run.first, run.first}; alike.first < run.last; alike.first = alike.last) {
            const Seen of = seen(s, alike.first, from, from + step);
            do {
                ++alike.last;
            } while (alike.last < run.last && seen(s, alike.last, from, from + step) == of);
            if (of.prefix > 0) body(alike, from, of.prefix, from);
            if (of.count > 0) body(alike, of.own, of.count, of.index);
        }
    }
}

// One key head of a run, and the query heads that share it.
void attend(const NewTokens& s, const Run& run, int64_t head) {
    const int64_t group = s.group(), queries = (run.last - run.first) * group, at = s.head_at(s.rows[run.first], head);
    const int64_t longest = *std::max_element(s.positions + run.first, s.positions + run.last) + 1;
    const int64_t step = (longest + 7) / 8 * 8 + 8;  // `score` writes up to 3 behind the last
    thread_local std::vector<float> turned, scores, mixed;
    turned.resize(queries * s.size), scores.resize(queries * step), mixed.assign(queries * s.size, 0.f);
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t token = run.first + q / group;
        turn(s.qkv_at(token, head * group + q % group), s.query_norm, s.rotations + s.positions[token] * s.size, s.size,
             s.eps, s.scale, turned.data() + q * s.size);
    }
    over_keys(s, run, [&](const Run& of, int64_t key, int64_t count, int64_t index) {
        const float* keys = s.keys + at + key * s.size;
        const int64_t last = (of.last - run.first) * group;
        int64_t q = (of.first - run.first) * group;
        for (; q + 2 <= last; q += 2) {
            score<2>(turned.data() + q * s.size, keys, count, s.size, scores.data() + q * step + index, step);
        }
        if (q < last) score<1>(turned.data() + q * s.size, keys, count, s.size, scores.data() + q * step + index, step);
    });
    thread_local std::vector<float> totals;
    totals.resize(queries);
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t length = s.positions[run.first + q / group] + 1;
        totals[q] = exponentials(scores.data() + q * step, length, (length + 7) / 8 * 8, 1.f);
    }
    over_keys(s, run, [&](const Run& of, int64_t key, int64_t count, int64_t index) {
        const float* values = s.values + at + key * s.size;
        const int64_t last = (of.last - run.first) * group;
        int64_t q = (of.first - run.first) * group;
        for (; q + 2 <= last; q += 2) {
            mix<2>(scores.data() + q * step + index, step, values, count, s.size, mixed.data() + q * s.size);
        }
        if (q < last) mix<1>(scores.data() + q * step + index, step, values, count, s.size, mixed.data() + q * s.size);
    });
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t token = run.first + q / group, column = (head * group + q % group) * s.size;
        float* out = s.out + (token / 16 * s.heads * s.size + column) * 16 + token % 16;
        for (int64_t i = 0; i < s.size; ++i) out[i * 16] = mixed[q * s.size + i] / totals[q];
    }
}

// Neighbours of one row, no more than share a piece of work.
std::vector<Run> runs_of(const NewTokens& s, int64_t tokens) {
    const int64_t most = std::max<int64_t>(QUERIES / s.group(), 1);
    std::vector<Run> runs;
    for (int64_t token = 0; token < tokens; ++token) {
        if (runs.empty() || s.rows[token] != s.rows[token - 1] || token - runs.back().first == most) {
            runs.push_back({token, token});
        }
        runs.back().last = token + 1;
    }
    return runs;
}

}  // namespace r1

// Writes keys and values of the new tokens to their places, then out = softmax(scale q k^T) v of each over what it
// sees.
//
// A row of the cache has a prefix, and behind it one sequence that goes on from there, or several. Token n is at
// positions[n] of its sequence and goes to places[n] of row rows[n]; of its sequence the first pasts[n] tokens are the
// row's first ones, and the others end with its own place.
//   qkv [tokens, heads + 2 * kv_heads, size]; query_norm, key_norm [size] or null; rotations [positions, size / 2]
//   complex; keys, values [cache rows, kv_heads, capacity, size]; out [panels, heads * size, 16], see linear.cpp. size
//   is a multiple of 8.
R1_EXPORT void r1_cpu_cached_attention(r1::RunTeam run, int64_t threads, const float* qkv, const float* query_norm,
                                       const float* key_norm, const float* rotations, const int64_t* positions,
                                       const int64_t* rows, const int64_t* places, const int64_t* pasts, float* keys,
                                       float* values, float* out, int64_t tokens, int64_t heads, int64_t kv_heads,
                                       int64_t size, int64_t capacity, float scale, float eps) {
    const r1::NewTokens of{qkv,    query_norm, key_norm, rotations, positions, rows,     places, pasts, keys,
                           values, out,        heads,    kv_heads,  size,      capacity, scale,  eps};
    const r1::Team team{run, threads};
    r1::parallel(team, tokens, [&](int64_t token) { r1::keep(of, token); });
    const std::vector<r1::Run> runs = r1::runs_of(of, tokens);
    r1::parallel(team, runs.size() * kv_heads,
                 [&](int64_t piece) { r1::attend(of, runs[piece % runs.size()], piece / runs.size()); });
}
