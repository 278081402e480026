// The weighted sum of each token's rows and its backward (kernels/r1kernels/moe_combine).
#include "moe_rows.cuh"

namespace {

constexpr int THREADS = 32 * MAX_ROW_WARPS;

// Four of a token's choices from `first` on; `missing` past the last. In one load where tokens lie at 16 bytes.
template <bool IS_WIDE, typename T>
__device__ void load4(const T* from, int first, int topk, T missing, T* to) {
    if (IS_WIDE) {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(from + first));
        memcpy(to, &words, 16);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = first + k < topk ? from[first + k] : missing;
    }
}

// A block a token, 8 columns a thread, AT_ONCE choices a step: 8 when topk allows it, as DeepSeek-V3's does. Their
// places and weights are then two loads of 16 bytes each.
template <int AT_ONCE>
__global__ void __launch_bounds__(THREADS) combine_kernel(const __nv_bfloat16* rows,      // [R, hidden]
                                                          const int* row_of,              // [T, topk], -1: nothing
                                                          const float* weights,           // [T, topk], null: all ones
                                                          const __nv_bfloat16* residual,  // [T, hidden] or null
                                                          __nv_bfloat16* out,             // [T, hidden], out
                                                          int64_t hidden, int topk) {
    const int64_t token = blockIdx.x;
    row_of += token * topk;
    if (weights) weights += token * topk;
    for (int64_t column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
        float sum[8] = {};
        for (int first = 0; first < topk; first += AT_ONCE) {
            int row[AT_ONCE];
            float weight[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k += 4) load4<AT_ONCE == 8>(row_of, first + k, topk, -1, row + k);
#pragma unroll
            for (int k = 0; k < AT_ONCE; k += 4) {
                if (weights) {
                    load4<AT_ONCE == 8>(weights, first + k, topk, 0.0f, weight + k);
                } else {
                    weight[k] = weight[k + 1] = weight[k + 2] = weight[k + 3] = 1.0f;
                }
            }
            uint4 words[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                // Loads without a condition go out together. Row 0 exists; what it gives is dropped below.
                words[k] = __ldcs(reinterpret_cast<const uint4*>(rows + max(row[k], 0) * hidden + column));
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                if (row[k] < 0) words[k] = make_uint4(0, 0, 0, 0);
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
    launch(topk % 8 == 0 ? combine_kernel<8> : combine_kernel<4>, dim3(tokens), 32 * row_warps(hidden, 256), stream,
           rows, row_of, weights, residual, out, hidden, static_cast<int>(topk));
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
