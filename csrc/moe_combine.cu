// The weighted sum of each token's rows and its backward (kernels/r1kernels/moe_combine).
#include "moe_rows.cuh"

namespace {

constexpr int THREADS = 32 * MAX_ROW_WARPS;

// A block a token, 8 columns a thread. With TOPK known all rows of a column are on their way at once.
template <int TOPK>
__global__ void __launch_bounds__(THREADS) combine_kernel(const __nv_bfloat16* rows,      // [R, hidden]
                                                          const int* row_of,              // [T, topk], -1: nothing
                                                          const float* weights,           // [T, topk], null: all ones
                                                          const __nv_bfloat16* residual,  // [T, hidden] or null
                                                          __nv_bfloat16* out,             // [T, hidden], out
                                                          int64_t hidden, int run_topk) {
    const int topk = TOPK ? TOPK : run_topk;
    const int64_t token = blockIdx.x;
    row_of += token * topk;
    if (weights) weights += token * topk;
    for (int64_t column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
        float sum[8] = {};
        constexpr int AT_ONCE = TOPK ? TOPK : 4;
        for (int first = 0; first < topk; first += AT_ONCE) {
            uint4 words[AT_ONCE];
            float weight[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int64_t row = first + k < topk ? row_of[first + k] : -1;
                words[k] = make_uint4(0, 0, 0, 0);
                if (row >= 0) words[k] = __ldcs(reinterpret_cast<const uint4*>(rows + row * hidden + column));
                weight[k] = row < 0 ? 0.0f : weights ? weights[first + k] : 1.0f;
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                float v[8];
                unpack(words[k], v);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] += weight[k] * v[i];
            }
        }
        if (residual) {
            float v[8];
            load8(residual + token * hidden + column, v);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += v[i];
        }
        *reinterpret_cast<uint4*>(out + token * hidden + column) = pack8(sum);
    }
}

}  // namespace

R1_EXPORT int r1_moe_combine(const __nv_bfloat16* rows, const int* row_of, const float* weights,
                             const __nv_bfloat16* residual, __nv_bfloat16* out, int64_t tokens, int64_t hidden,
                             int64_t topk, cudaStream_t stream) {
    launch(topk == 8 ? combine_kernel<8> : combine_kernel<0>, dim3(tokens), 32 * row_warps(hidden, 256), stream, rows,
           row_of, weights, residual, out, hidden, static_cast<int>(topk));
    return cudaGetLastError();
}

// rows and dots may be null together: no gradient of the weights.
R1_EXPORT int r1_moe_combine_backward(const __nv_bfloat16* grad, const int* row_of, const int* slot_of,
                                      const int* offsets, const float* weights, const __nv_bfloat16* rows,
                                      __nv_bfloat16* grad_rows, float* dots, int64_t tokens, int64_t num_rows,
                                      int64_t num_experts, int64_t hidden, int64_t topk, cudaStream_t stream) {
    const auto run = rows ? spread<true> : spread<false>;
    run(grad, row_of, slot_of, offsets, weights, rows, grad_rows, dots, tokens, num_rows, num_experts, hidden, topk,
        stream);
    return cudaGetLastError();
}
