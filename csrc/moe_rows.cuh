// A token's row copied to the rows of its choices, as bfloat16: what the permutation and the combine's backward share.
#pragma once

#include "rows.cuh"

constexpr int MAX_CHOICES = 32;   // of a token
constexpr int MAX_ROW_WARPS = 8;  // of a block of threads that works on one token

// Warps for rows of `hidden` columns, `columns` of them a warp at a time: no more than that many steps, evenly shared.
inline int row_warps(int64_t hidden, int64_t columns) {
    const int64_t steps = ceil_div(hidden, columns);
    return static_cast<int>(ceil_div(steps, ceil_div(steps, MAX_ROW_WARPS)));
}

// One sum for each choice, over all threads of the block, added up in a fixed order.
struct ChoiceSums {
    float (*of_warp)[MAX_ROW_WARPS];  // [MAX_CHOICES][MAX_ROW_WARPS] in shared memory

    // Call at the start by the whole block: a warp's entries belong to its lane 0.
    __device__ void clear(int topk) {
        if (threadIdx.x % 32 == 0)
            for (int k = 0; k < topk; ++k) of_warp[k][threadIdx.x / 32] = 0.0f;
    }
    __device__ void add(int k, float lane_value) {
        const float sum = warp_sum(lane_value);
        if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] += sum;
    }
    // Call at the end by the whole block.
    __device__ void write(float* to, int topk) {
        __syncthreads();
        for (int k = threadIdx.x; k < topk; k += blockDim.x) {
            float sum = 0.0f;
            for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += of_warp[k][warp];
            to[k] = sum;
        }
    }
};

// out[row_of[t, k]] = weights[t, k] * x[t]; with HAS_DOT also dots[t, k] = dot(x[t], rows[row_of[t, k]]).
template <bool HAS_DOT>
__global__ void __launch_bounds__(32 * MAX_ROW_WARPS)
    spread_kernel(const __nv_bfloat16* x,     // [T, hidden]
                  const int* row_of,          // [T, topk], -1: nowhere
                  const float* weights,       // [T, topk], null: all ones
                  const __nv_bfloat16* rows,  // [R, hidden], with HAS_DOT
                  __nv_bfloat16* out,         // [R, hidden], out
                  float* dots,                // [T, topk], out, with HAS_DOT
                  int64_t hidden, int topk) {
    __shared__ float of_warp[HAS_DOT ? MAX_CHOICES : 1][MAX_ROW_WARPS];
    ChoiceSums sums{of_warp};
    if (HAS_DOT) sums.clear(topk);
    const int64_t token = blockIdx.x;
    row_of += token * topk;
    if (weights) weights += token * topk;
    // The loop is the same for all lanes of a warp, which sum together.
    for (int64_t step = threadIdx.x / 32 * 256; step < hidden; step += blockDim.x * 8) {
        const int64_t column = step + threadIdx.x % 32 * 8;
        const bool is_inside = column < hidden;
        float v[8] = {};
        if (is_inside) load8(x + token * hidden + column, v);
        const uint4 plain = pack8(v);  // exact: v came from bfloat16
        for (int k = 0; k < topk; ++k) {
            const int64_t row = row_of[k];
            if (row < 0) continue;
            float dot = 0.0f;
            if (is_inside) {
                uint4 scaled = plain;
                if (weights) {
                    const float weight = weights[k];
                    float w[8];
#pragma unroll
                    for (int i = 0; i < 8; ++i) w[i] = weight * v[i];
                    scaled = pack8(w);
                }
                __stcs(reinterpret_cast<uint4*>(out + row * hidden + column), scaled);
                if (HAS_DOT) {
                    float y[8];
                    load8(rows + row * hidden + column, y);
#pragma unroll
                    for (int i = 0; i < 8; ++i) dot += v[i] * y[i];
                }
            }
            if (HAS_DOT) sums.add(k, dot);
        }
    }
    if (HAS_DOT) sums.write(dots + token * topk, topk);
}

// Zeros for the padding rows of the experts: a warp a row.
static __global__ void __launch_bounds__(256) zero_padding_kernel(const int* slot_of,  // [R], -1: padding
                                                                  const int* last,     // number of rows in use
                                                                  __nv_bfloat16* out,  // [R, hidden]
                                                                  int64_t num_rows, int64_t hidden) {
    const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
    if (row >= num_rows || row >= *last || slot_of[row] >= 0) return;
    for (int64_t column = threadIdx.x % 32 * 8; column < hidden; column += 256)
        *reinterpret_cast<uint4*>(out + row * hidden + column) = make_uint4(0, 0, 0, 0);
}

template <bool HAS_DOT>
void spread(const __nv_bfloat16* x, const int* row_of, const int* slot_of, const int* offsets, const float* weights,
            const __nv_bfloat16* rows, __nv_bfloat16* out, float* dots, int64_t tokens, int64_t num_rows,
            int64_t num_experts, int64_t hidden, int64_t topk, cudaStream_t stream) {
    launch(spread_kernel<HAS_DOT>, dim3(tokens), 32 * row_warps(hidden, 256), stream, x, row_of, weights, rows, out,
           dots, hidden, static_cast<int>(topk));
    launch(zero_padding_kernel, dim3(ceil_div(num_rows, 8)), 256, stream, slot_of, offsets + num_experts, out, num_rows,
           hidden);
}
