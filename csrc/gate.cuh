// The scores of one token in the registers of a warp: what the router and its backward share.
#pragma once

#include <type_traits>

#include "rows.cuh"

constexpr float NORM_FLOOR = 1e-20f;
constexpr int MAX_GATE_BLOCKS = 1024;  // a few waves on any GPU; each adds its histogram once

__host__ __device__ constexpr int gate_warps(int v) { return v >= 32 ? 4 : 8; }

struct GateArgs {
    const float* bias;      // [E] or null
    const int* replay_ids;  // [T, topk] or null
    int* ids;               // [T, topk], out
    float* weights;         // [T, topk], out
    int* counts;            // [E], out, zero at the start
    float* normalizer;      // [T], out, or null
    int64_t tokens;
    int num_experts, topk, n_group, topk_group;
    bool is_softmax, norm;
    float scale;
};

// Unsigned numbers in the order of the floats; that of -inf is above 0.
__device__ inline unsigned order_key(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// V neighbouring values from `row` on for this lane; `missing` past the end. 16 bytes at a time where rows allow it.
template <int V>
__device__ void load_lane(const float* row, int length, float missing, float* v) {
    const int first = threadIdx.x % 32 * V;
    if (V % 4 == 0 && length % V == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            float4 x = make_float4(missing, missing, missing, missing);
            if (first < length) x = __ldg(reinterpret_cast<const float4*>(row + first + i));
            v[i] = x.x;
            v[i + 1] = x.y;
            v[i + 2] = x.z;
            v[i + 3] = x.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = first + j < length ? row[first + j] : missing;
    }
}

// The reverse of load_lane.
template <int V>
__device__ void store_lane(float* row, int length, const float* v) {
    const int first = threadIdx.x % 32 * V;
    if (V % 4 == 0 && length % V == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4)
            if (first < length)
                *reinterpret_cast<float4*>(row + first + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j)
            if (first + j < length) row[first + j] = v[j];
    }
}

// Within 2 units in the last place. Exact division would call a subroutine for what cannot occur here.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// s = sigmoid(logits) or softmax(logits) of one token, in float32.
template <int V>
struct Scores {
    float s[V];  // 0 for experts that do not exist
    bool is_softmax;
    float top, sum;

    __device__ Scores(const float* row, int num_experts, bool is_softmax)
        : is_softmax(is_softmax), top(0.0f), sum(1.0f) {
        load_lane<V>(row, num_experts, -INFINITY, s);
        if (is_softmax) {
            top = -INFINITY;
#pragma unroll
            for (int j = 0; j < V; ++j) top = fmaxf(top, s[j]);
            top = warp_max(top);
            float own = 0.0f;
#pragma unroll
            for (int j = 0; j < V; ++j) own += expf(s[j] - top);
            sum = warp_sum(own);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) s[j] = of(s[j]);
    }
    __device__ float of(float logit) const { return is_softmax ? __fdividef(expf(logit - top), sum) : sigmoid(logit); }
    // The sum of all scores; for softmax, where that is 1, the logarithm that its exponents need.
    __device__ float normalizer() const {
        if (is_softmax) return top + logf(sum);
        float own = 0.0f;
#pragma unroll
        for (int j = 0; j < V; ++j) own += s[j];
        return warp_sum(own);
    }
};

// Calls run with how many experts a lane holds: few sizes, so that few kernels are compiled; 8 is DeepSeek-V3's.
template <typename Run>
void for_lanes(int64_t num_experts, Run run) {
    if (num_experts <= 64) return run(std::integral_constant<int, 2>());
    if (num_experts <= 256) return run(std::integral_constant<int, 8>());
    run(std::integral_constant<int, 32>());
}
