// Tokens to the rows of their experts, quantized on the way or not (kernels/r1kernels/moe_permute_quant).
#include "moe_rows.cuh"

namespace {

constexpr int BLOCK = 128;  // values that share a scale
constexpr int COLUMNS = 16;
constexpr int THREADS = 256;

// A block a token, 16 columns a thread: 8 lanes are a block of 128. x is read once, its codes are stored topk times.
// x is bfloat16, or e4m3 codes with their scales (IS_CODES), which are copied.
template <bool IS_CODES, bool HAS_DOT>
__global__ void __launch_bounds__(32 * MAX_ROW_WARPS)
    spread_fp8_kernel(const void* x,              // [T, hidden]
                      const float* x_scale,       // [T, hidden / 128], with IS_CODES
                      const int* row_of,          // [T, topk], -1: nowhere
                      const float* weights,       // [T, topk], null: all ones; multiply the scales
                      const __nv_bfloat16* rows,  // [R, hidden], with HAS_DOT
                      uint8_t* values,            // [R, hidden], out
                      float* scale,               // [hidden / 128, R], out
                      float* dots,                // [T, topk], out, with HAS_DOT: dot(x[t], rows[row_of[t, k]])
                      int64_t num_rows, int64_t hidden, int topk) {
    __shared__ float of_warp[HAS_DOT ? MAX_CHOICES : 1][MAX_ROW_WARPS];
    ChoiceSums sums{of_warp};
    if (HAS_DOT) sums.clear(topk);
    const int64_t token = blockIdx.x;
    row_of += token * topk;
    if (weights) weights += token * topk;
    for (int64_t step = threadIdx.x / 32 * 512; step < hidden; step += blockDim.x * COLUMNS) {
        const int64_t column = step + threadIdx.x % 32 * COLUMNS;
        const bool is_inside = column < hidden;
        float v[COLUMNS] = {};
        float own_scale = 0.0f;
        uint4 codes = make_uint4(0, 0, 0, 0);
        if (IS_CODES) {
            if (is_inside) {
                codes = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(x) + token * hidden + column));
                own_scale = x_scale[token * (hidden / BLOCK) + column / BLOCK];
            }
        } else {
            if (is_inside) load16(static_cast<const __nv_bfloat16*>(x) + token * hidden + column, v);
            const BlockScale block(max_of_lanes<BLOCK / COLUMNS>(amax_bits<COLUMNS>(v)));
            codes = quantize16(v, block.inverse);
            own_scale = block.scale;
        }
        for (int k = 0; k < topk; ++k) {
            const int64_t row = row_of[k];
            if (row < 0) continue;
            if (is_inside) {
                __stcs(reinterpret_cast<uint4*>(values + row * hidden + column), codes);
                if (threadIdx.x % 8 == 0)
                    scale[column / BLOCK * num_rows + row] = weights ? own_scale * weights[k] : own_scale;
            }
            if (HAS_DOT) {
                float dot = 0.0f;
                if (is_inside) {
                    float y[COLUMNS];
                    load16(rows + row * hidden + column, y);
#pragma unroll
                    for (int i = 0; i < COLUMNS; ++i) dot += v[i] * y[i];
                }
                sums.add(k, dot);
            }
        }
    }
    if (HAS_DOT) sums.write(dots + token * topk, topk);
}

// The transposed form of 128 rows of one expert and 128 columns, in blocks of 128x1. A thread holds 16 columns of 4
// neighbouring rows; the codes change places in shared memory, 4 rows of a column in a word.
__global__ void __launch_bounds__(THREADS, 3)     // blocks on an SM: at most 85 registers
    transpose_fp8_kernel(const __nv_bfloat16* x,  // [T, hidden]
                         const int* slot_of,      // [R], -1: padding, which is zero
                         const int* expert_of,    // [R]
                         const int* offsets,      // [E + 1], multiples of 128
                         const float* weights,    // [T, topk], null: all ones; multiply the values
                         uint8_t* values_t,  // [R * hidden], out: expert e is [hidden, its rows] from offsets[e] on
                         float* scale_t,     // [R / 128, hidden], out
                         int64_t hidden, int topk) {
    __shared__ unsigned amax_of_warp[THREADS / 32][BLOCK];
    __shared__ float inverse[BLOCK];
    __shared__ uint4 tile[BLOCK * BLOCK / 16];  // [column][row], its 16-byte parts swapped against bank conflicts
    const int64_t tiles = hidden / BLOCK;
    const int64_t row_block = blockIdx.x / tiles, first_column = blockIdx.x % tiles * BLOCK;
    const int expert = expert_of[row_block * BLOCK];
    if (expert < 0) return;  // after the last expert
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int quad = threadIdx.x / 8, column = threadIdx.x % 8 * COLUMNS;  // 4 rows from 4 * quad on

    float v[4][COLUMNS];
    unsigned amax[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) amax[j] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int slot = slot_of[row_block * BLOCK + 4 * quad + i];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) v[i][j] = 0.0f;
        if (slot >= 0) load16(x + static_cast<int64_t>(slot / topk) * hidden + first_column + column, v[i]);
        const float weight = slot >= 0 && weights ? weights[slot] : 1.0f;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            v[i][j] *= weight;
            amax[j] = max(amax[j], __float_as_uint(v[i][j]) & 0x7fffffffu);
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {  // over the 4 quads of the warp: lanes with the same columns
        amax[j] = max(amax[j], __shfl_xor_sync(ALL_LANES, amax[j], 8));
        amax[j] = max(amax[j], __shfl_xor_sync(ALL_LANES, amax[j], 16));
        if (lane < 8) amax_of_warp[warp][column + j] = amax[j];
    }
    __syncthreads();
    if (threadIdx.x < BLOCK) {
        unsigned most = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) most = max(most, amax_of_warp[w][threadIdx.x]);
        const BlockScale block(most);
        inverse[threadIdx.x] = block.inverse;
        scale_t[row_block * hidden + first_column + threadIdx.x] = block.scale;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        const float own = inverse[column + j];
        const int part = quad / 4 ^ column / COLUMNS;
        reinterpret_cast<unsigned*>(&tile[(column + j) * (BLOCK / 16) + part])[quad % 4] =
            quantize4(v[0][j] * own, v[1][j] * own, v[2][j] * own, v[3][j] * own);
    }
    __syncthreads();
    const int64_t start = offsets[expert], length = offsets[expert + 1] - start;
    uint8_t* to = values_t + start * hidden + first_column * length + (row_block * BLOCK - start);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int c = threadIdx.x / 8 + 32 * i, part = threadIdx.x % 8;
        *reinterpret_cast<uint4*>(to + c * length + part * 16) = tile[c * (BLOCK / 16) + (part ^ c / COLUMNS)];
    }
}

}  // namespace

// rows and dots may be null together; weights may be null.
R1_EXPORT int r1_moe_permute_quant(const __nv_bfloat16* x, const int* row_of, const float* weights,
                                   const __nv_bfloat16* rows, uint8_t* values, float* scale, float* dots,
                                   int64_t tokens, int64_t num_rows, int64_t hidden, int64_t topk,
                                   cudaStream_t stream) {
    launch(rows ? spread_fp8_kernel<false, true> : spread_fp8_kernel<false, false>, dim3(tokens),
           32 * row_warps(hidden, 512), stream, x, static_cast<const float*>(nullptr), row_of, weights, rows, values,
           scale, dots, num_rows, hidden, static_cast<int>(topk));
    return cudaGetLastError();
}

R1_EXPORT int r1_moe_permute_fp8(const uint8_t* x, const float* x_scale, const int* row_of, uint8_t* values,
                                 float* scale, int64_t tokens, int64_t num_rows, int64_t hidden, int64_t topk,
                                 cudaStream_t stream) {
    launch(spread_fp8_kernel<true, false>, dim3(tokens), 32 * row_warps(hidden, 512), stream, x, x_scale, row_of,
           static_cast<const float*>(nullptr), static_cast<const __nv_bfloat16*>(nullptr), values, scale,
           static_cast<float*>(nullptr), num_rows, hidden, static_cast<int>(topk));
    return cudaGetLastError();
}

R1_EXPORT int r1_moe_transpose_quant(const __nv_bfloat16* x, const int* slot_of, const int* expert_of,
                                     const int* offsets, const float* weights, uint8_t* values_t, float* scale_t,
                                     int64_t num_rows, int64_t hidden, int64_t topk, cudaStream_t stream) {
    launch(transpose_fp8_kernel, dim3(num_rows / BLOCK * (hidden / BLOCK)), THREADS, stream, x, slot_of, expert_of,
           offsets, weights, values_t, scale_t, hidden, static_cast<int>(topk));
    return cudaGetLastError();
}

R1_EXPORT int r1_moe_permute(const __nv_bfloat16* x, const int* row_of, const int* slot_of, const int* offsets,
                             __nv_bfloat16* out, int64_t tokens, int64_t num_rows, int64_t num_experts, int64_t hidden,
                             int64_t topk, cudaStream_t stream) {
    spread<false>(x, row_of, slot_of, offsets, nullptr, nullptr, out, nullptr, tokens, num_rows, num_experts, hidden,
                  topk, stream);
    return cudaGetLastError();
}
