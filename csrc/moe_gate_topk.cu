// DeepSeek-V3's router (kernels/r1kernels/moe_gate_topk): a warp a token, lane l holds experts l * V .. l * V + V - 1,
// so that a lower lane has lower experts and ties go to the lowest index.
#include "gate.cuh"

namespace {

// The two highest of a group, kept sorted.
struct Top2 {
    float first = -INFINITY, second = -INFINITY;

    __device__ void add(float x) {
        second = fmaxf(second, fminf(first, x));
        first = fmaxf(first, x);
    }
    __device__ unsigned key(int size) const { return order_key(size == 1 ? first : first + second); }
};

// Number of groups that come before this one.
template <typename KeyOf>
__device__ int rank_of(unsigned own, int group, int n_group, KeyOf key_of) {
    int rank = 0;
    for (int g = 0; g < n_group; ++g) {
        const unsigned other = key_of(g);
        rank += other > own || (other == own && g < group);
    }
    return rank;
}

// Keys of the experts outside the best groups become 0, below that of -inf. A group is 1, 2, 4 .. lanes.
template <int V>
__device__ void mask_in_lanes(const float* biased, unsigned* key, int lanes_of_group, int n_group, int topk_group) {
    Top2 best;
#pragma unroll
    for (int j = 0; j < V; ++j) best.add(biased[j]);
    for (int lanes = 1; lanes < lanes_of_group; lanes *= 2) {
        const float first = __shfl_xor_sync(ALL_LANES, best.first, lanes);
        const float second = __shfl_xor_sync(ALL_LANES, best.second, lanes);
        best.add(first);
        best.add(second);
    }
    const unsigned own = best.key(V * lanes_of_group);
    const int group = threadIdx.x % 32 / lanes_of_group;
    const int rank =
        rank_of(own, group, n_group, [&](int g) { return __shfl_sync(ALL_LANES, own, g * lanes_of_group); });
#pragma unroll
    for (int j = 0; j < V; ++j) key[j] = rank < topk_group ? key[j] : 0;
}

// The same for any size of a group, through shared memory: scores [E], keys [n_group].
template <int V>
__device__ void mask_in_shared(const float* biased, unsigned* key, float* scores, unsigned* keys,
                               const GateArgs& args) {
    const int lane = threadIdx.x % 32, size = args.num_experts / args.n_group;
    __syncwarp();  // the token before is done with both
#pragma unroll
    for (int j = 0; j < V; ++j)
        if (lane * V + j < args.num_experts) scores[lane * V + j] = biased[j];
    __syncwarp();
    for (int g = lane; g < args.n_group; g += 32) {
        Top2 best;
        for (int i = 0; i < size; ++i) best.add(scores[g * size + i]);
        keys[g] = best.key(size);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int expert = lane * V + j, group = expert / size;
        if (expert >= args.num_experts) continue;
        const int rank = rank_of(keys[group], group, args.n_group, [&](int g) { return keys[g]; });
        if (rank >= args.topk_group) key[j] = 0;
    }
}

// Lane k gets the id and the unbiased score of the k-th choice.
template <int V>
__device__ void choose_topk(const float* s, unsigned* key, int topk, int* id, float* score) {
    const int lane = threadIdx.x % 32;
    for (int k = 0; k < topk; ++k) {
        unsigned best = 0;
        int place = 0;
        float value = 0.0f;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (key[j] <= best) continue;
            best = key[j];
            place = j;
            value = s[j];
        }
        const unsigned most = __reduce_max_sync(ALL_LANES, best);
        const int owner = __ffs(static_cast<int>(__ballot_sync(ALL_LANES, best == most))) - 1;
        const int chosen = __shfl_sync(ALL_LANES, lane * V + place, owner);
        const float chosen_value = __shfl_sync(ALL_LANES, value, owner);
        if (lane == k) {
            *id = chosen;
            *score = chosen_value;
        }
#pragma unroll
        for (int j = 0; j < V; ++j) key[j] = lane * V + j == chosen ? 0 : key[j];
    }
}

// IS_SHARED: groups are not a power of two of lanes, so their scores are found through shared memory.
template <int V, bool IS_SHARED>
__global__ void __launch_bounds__(32 * gate_warps(V)) gate_kernel(GateArgs args, const float* logits) {
    constexpr int WARPS = gate_warps(V);
    __shared__ int histogram[32 * V];
    __shared__ float scores[IS_SHARED ? WARPS : 1][IS_SHARED ? 32 * V : 1];
    __shared__ unsigned keys[IS_SHARED ? WARPS : 1][IS_SHARED ? 32 * V : 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) histogram[e] = 0;
    float bias[V];
#pragma unroll
    for (int j = 0; j < V; ++j) bias[j] = args.bias && lane * V + j < args.num_experts ? args.bias[lane * V + j] : 0.0f;
    __syncthreads();

    for (int64_t token = int64_t{blockIdx.x} * WARPS + warp; token < args.tokens; token += int64_t{gridDim.x} * WARPS) {
        const float* row = logits + token * args.num_experts;
        Scores<V> scored(row, args.num_experts, args.is_softmax);
        const int recorded = args.replay_ids && lane < args.topk ? args.replay_ids[token * args.topk + lane] : -1;
        int id = recorded;
        float score = 0.0f;
        if (__shfl_sync(ALL_LANES, recorded, 0) >= 0) {
            if (lane < args.topk) score = scored.of(row[id]);
        } else {
            float biased[V];
            unsigned key[V];
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float x = scored.s[j] + bias[j];
                const bool is_expert = lane * V + j < args.num_experts;
                biased[j] = x == x && is_expert ? x : -INFINITY;
                key[j] = is_expert ? order_key(biased[j]) : 0;
            }
            if (IS_SHARED)
                mask_in_shared<V>(biased, key, scores[IS_SHARED ? warp : 0], keys[IS_SHARED ? warp : 0], args);
            else if (args.topk_group < args.n_group)
                mask_in_lanes<V>(biased, key, args.num_experts / args.n_group / V, args.n_group, args.topk_group);
            choose_topk<V>(scored.s, key, args.topk, &id, &score);
        }
        float factor = args.scale;
        if (args.norm) factor = __fdividef(factor, warp_sum(lane < args.topk ? score : 0.0f) + NORM_FLOOR);
        if (lane < args.topk) {
            args.ids[token * args.topk + lane] = id;
            args.weights[token * args.topk + lane] = score * factor;
            atomicAdd(&histogram[id], 1);
        }
        if (args.normalizer) {
            const float normalizer = scored.normalizer();
            if (lane == 0) args.normalizer[token] = normalizer;
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        if (histogram[e]) atomicAdd(&args.counts[e], histogram[e]);
}

}  // namespace

// bias, replay_ids and normalizer may be null. normalizer [T]: what r1_moe_gate_sums needs of each token.
R1_EXPORT int r1_moe_gate_topk(const float* logits, const float* bias, const int* replay_ids, int* ids, float* weights,
                               int* counts, float* normalizer, int64_t tokens, int64_t num_experts, int64_t topk,
                               int64_t n_group, int64_t topk_group, int64_t is_softmax, int64_t norm, float scale,
                               cudaStream_t stream) {
    GateArgs args{bias, replay_ids, ids, weights, counts, normalizer, tokens};
    args.num_experts = static_cast<int>(num_experts);
    args.topk = static_cast<int>(topk);
    args.n_group = static_cast<int>(n_group);
    args.topk_group = static_cast<int>(topk_group);
    args.is_softmax = is_softmax != 0;
    args.norm = norm != 0;
    args.scale = scale;
    cudaMemsetAsync(counts, 0, num_experts * sizeof(int), stream);
    for_lanes(num_experts, [&](auto v) {
        constexpr int V = decltype(v)::value;
        const int size = args.num_experts / args.n_group, lanes = size / V;
        const bool is_in_lanes = size % V == 0 && (lanes & (lanes - 1)) == 0;
        const bool is_shared = topk_group < n_group && !is_in_lanes;
        const int64_t blocks = min(ceil_div(tokens, gate_warps(V)), int64_t{MAX_GATE_BLOCKS});
        launch(is_shared ? gate_kernel<V, true> : gate_kernel<V, false>, dim3(blocks), 32 * gate_warps(V), stream, args,
               logits);
    });
    return cudaGetLastError();
}
