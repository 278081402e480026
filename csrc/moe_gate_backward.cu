// The sums of the sequences that the balance loss needs, and the gradient of the router's logits
// (kernels/r1kernels/moe_gate_topk).
#include "gate.cuh"

namespace {

constexpr int SUM_EXPERTS = 32, SUM_LANES = 8;  // a block: 32 experts, 8 tokens at a time

struct BackwardArgs {
    const int* ids;             // [T, topk]
    const float* grad_weights;  // [T, topk]
    const float* grad_scores;   // [S, E], gradient of the sums of s_i / sum_j s_j, or null
    const int* cu_seqlens;      // [S + 1], with grad_scores
    int64_t tokens, num_sequences;
    int num_experts, topk;
    bool is_softmax, norm;
    float scale;
};

// For one sequence and 32 experts: how many of its choices each has, and the sum of s_i / sum_j s_j over its tokens.
__global__ void __launch_bounds__(SUM_EXPERTS* SUM_LANES)
    sums_kernel(const float* logits,      // [T, E]
                const int* ids,           // [T, topk]
                const float* normalizer,  // [T]
                const int* cu_seqlens,    // [S + 1]
                int* counts,              // [S, E], out
                float* scores,            // [S, E], out
                int64_t tokens, int num_experts, int topk, bool is_softmax) {
    __shared__ int histogram[SUM_EXPERTS];
    __shared__ float partial[SUM_LANES][SUM_EXPERTS];
    const int lane = threadIdx.x % SUM_EXPERTS, turn = threadIdx.x / SUM_EXPERTS;
    const int first = blockIdx.x * SUM_EXPERTS, expert = first + lane;
    const int64_t begin = cu_seqlens[blockIdx.y], end = min(int64_t{cu_seqlens[blockIdx.y + 1]}, tokens);
    if (threadIdx.x < SUM_EXPERTS) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t slot = begin * topk + threadIdx.x; slot < end * topk; slot += blockDim.x) {
        const int place = ids[slot] - first;
        if (place >= 0 && place < SUM_EXPERTS) atomicAdd(&histogram[place], 1);
    }
    float sum = 0.0f;
    if (expert < num_experts) {
        for (int64_t token = begin + turn; token < end; token += SUM_LANES) {
            const float x = logits[token * num_experts + expert], own = normalizer[token];
            sum += is_softmax ? expf(x - own) : __fdividef(sigmoid(x), own + NORM_FLOOR);
        }
    }
    partial[turn][lane] = sum;
    __syncthreads();
    if (threadIdx.x < SUM_EXPERTS && expert < num_experts) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < SUM_LANES; ++i) total += partial[i][lane];
        counts[int64_t{blockIdx.y} * num_experts + expert] = histogram[lane];
        scores[int64_t{blockIdx.y} * num_experts + expert] = total;
    }
}

// The sequence of a token: the last border that is not after it. Borders of empty sequences are equal.
__device__ int64_t sequence_of(const int* cu_seqlens, int64_t num_sequences, int64_t token) {
    int64_t low = 0, high = num_sequences;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (cu_seqlens[middle + 1] <= token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// d(loss)/d(score) of lane k's choice, from that of its weight.
__device__ float score_gradient(float grad_weight, float score, bool is_choice, const BackwardArgs& args) {
    const float grad = is_choice ? grad_weight * args.scale : 0.0f;
    if (!args.norm) return grad;
    const float total = warp_sum(is_choice ? score : 0.0f) + NORM_FLOOR;
    return __fdividef(grad - __fdividef(warp_sum(grad * score), total), total);
}

// A warp a token. IS_DENSE: every logit has a gradient (softmax, or the sums of the sequences); else only the chosen.
template <int V, bool IS_DENSE>
__global__ void __launch_bounds__(32 * gate_warps(V)) backward_kernel(BackwardArgs args,
                                                                      const float* logits,   // [T, E]
                                                                      float* grad_logits) {  // [T, E], out
    const int64_t token = int64_t{blockIdx.x} * gate_warps(V) + threadIdx.x / 32;
    if (token >= args.tokens) return;  // the whole warp
    const int lane = threadIdx.x % 32;
    const float* row = logits + token * args.num_experts;
    const bool is_choice = lane < args.topk;
    const int id = is_choice ? args.ids[token * args.topk + lane] : 0;
    const float grad_weight = is_choice ? args.grad_weights[token * args.topk + lane] : 0.0f;
    const float logit = is_choice ? row[id] : 0.0f;

    float out[V];  // gradient of the scores, in the end of the logits
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = 0.0f;
    const auto spread = [&](float value) {  // lane k's value to the lane that holds its expert
        for (int k = 0; k < args.topk; ++k) {
            const int chosen = __shfl_sync(ALL_LANES, id, k);
            const float own = __shfl_sync(ALL_LANES, value, k);
#pragma unroll
            for (int j = 0; j < V; ++j) out[j] += lane * V + j == chosen ? own : 0.0f;
        }
    };
    if (!IS_DENSE) {
        const float s = sigmoid(logit);
        spread(score_gradient(grad_weight, s, is_choice, args) * s * (1.0f - s));
    } else {
        Scores<V> scored(row, args.num_experts, args.is_softmax);
        spread(score_gradient(grad_weight, scored.of(logit), is_choice, args));
        const int64_t sequence = args.grad_scores ? sequence_of(args.cu_seqlens, args.num_sequences, token) : 0;
        if (args.grad_scores && sequence < args.num_sequences && token >= args.cu_seqlens[0]) {
            float grad[V];
            load_lane<V>(args.grad_scores + sequence * args.num_experts, args.num_experts, 0.0f, grad);
            float total = 1.0f, mean = 0.0f;
            if (!args.is_softmax) {
                total = scored.normalizer() + NORM_FLOOR;
#pragma unroll
                for (int j = 0; j < V; ++j) mean += grad[j] * scored.s[j];
                mean = __fdividef(warp_sum(mean), total);
            }
#pragma unroll
            for (int j = 0; j < V; ++j) out[j] += __fdividef(grad[j] - mean, total);
        }
        float dot = 0.0f;
        if (args.is_softmax) {
#pragma unroll
            for (int j = 0; j < V; ++j) dot += scored.s[j] * out[j];
            dot = warp_sum(dot);
        }
#pragma unroll
        for (int j = 0; j < V; ++j)
            out[j] = args.is_softmax ? scored.s[j] * (out[j] - dot) : out[j] * scored.s[j] * (1.0f - scored.s[j]);
    }
    store_lane<V>(grad_logits + token * args.num_experts, args.num_experts, out);
}

}  // namespace

R1_EXPORT int r1_moe_gate_sums(const float* logits, const int* ids, const float* normalizer, const int* cu_seqlens,
                               int* counts, float* scores, int64_t tokens, int64_t num_experts, int64_t topk,
                               int64_t num_sequences, int64_t is_softmax, cudaStream_t stream) {
    launch(sums_kernel, dim3(ceil_div(num_experts, SUM_EXPERTS), num_sequences), SUM_EXPERTS * SUM_LANES, stream,
           logits, ids, normalizer, cu_seqlens, counts, scores, tokens, static_cast<int>(num_experts),
           static_cast<int>(topk), is_softmax != 0);
    return cudaGetLastError();
}

// grad_scores and cu_seqlens may be null together.
R1_EXPORT int r1_moe_gate_backward(const float* logits, const int* ids, const float* grad_weights,
                                   const float* grad_scores, const int* cu_seqlens, float* grad_logits, int64_t tokens,
                                   int64_t num_experts, int64_t topk, int64_t num_sequences, int64_t is_softmax,
                                   int64_t norm, float scale, cudaStream_t stream) {
    BackwardArgs args{ids, grad_weights, grad_scores, cu_seqlens, tokens, num_sequences};
    args.num_experts = static_cast<int>(num_experts);
    args.topk = static_cast<int>(topk);
    args.is_softmax = is_softmax != 0;
    args.norm = norm != 0;
    args.scale = scale;
    for_lanes(num_experts, [&](auto v) {
        constexpr int V = decltype(v)::value;
        launch(is_softmax || grad_scores ? backward_kernel<V, true> : backward_kernel<V, false>,
               dim3(ceil_div(tokens, gate_warps(V))), 32 * gate_warps(V), stream, args, logits, grad_logits);
    });
    return cudaGetLastError();
}
