// FP8 block casts (kernels/r1kernels/fp8_cast): a block of threads casts a tile of 128x128.
//
// Thread i holds 16 columns from 16 * (i % 8) on, in rows i / 8 + 0, 32, 64, 96. A row of the tile is 8 lanes of a
// warp.
#include "rows.cuh"

namespace {

constexpr int TILE = 128, THREADS = 256, ROWS = 4, COLUMNS = 16;

struct Position {
    int64_t matrix, row, column;  // row: the first of the thread
    int64_t tile;                 // index of the tile's scale in a tile-wise matrix of scales

    __device__ explicit Position(int64_t n) {
        const auto tiles_n = static_cast<unsigned>(ceil_div(n, TILE));
        matrix = blockIdx.y;
        row = int64_t{blockIdx.x / tiles_n} * TILE + threadIdx.x / 8;
        column = blockIdx.x % tiles_n * TILE + threadIdx.x % 8 * COLUMNS;
        tile = matrix * gridDim.x + blockIdx.x;
    }
};

// IS_WIDE: n is divisible by 16, so a thread's 16 columns are all inside or all outside and lie at 16 bytes.
template <bool IS_WIDE, typename T>
__device__ void load_columns(const T* row, int64_t column, int64_t n, float* v) {
    if (IS_WIDE && column < n) return load16(row + column, v);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) v[i] = !IS_WIDE && column + i < n ? to_float(row[column + i]) : 0.0f;
}

template <typename T, bool IS_PER_ROW, bool IS_WIDE>
__global__ void __launch_bounds__(THREADS) quantize_kernel(const T* x,       // [batch, m, n]
                                                           uint8_t* values,  // [batch, m, n], out: e4m3
                                                           float* scale,     // out: a row's n / 128, or a tile's
                                                           int64_t m, int64_t n) {
    __shared__ unsigned of_warp[THREADS / 32];
    const Position at(n);
    x += at.matrix * m * n;
    values += at.matrix * m * n;
    float v[ROWS][COLUMNS];
    unsigned amax[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t row = at.row + 32 * i;
        load_columns<IS_WIDE>(x + row * n, row < m ? at.column : n, n, v[i]);
        amax[i] = max_of_lanes<8>(amax_bits<COLUMNS>(v[i]));
    }
    if (!IS_PER_ROW) {
        const unsigned own = max_of_lanes<32>(max(max(amax[0], amax[1]), max(amax[2], amax[3])));
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
        __syncthreads();
#pragma unroll
        for (int warp = 0; warp < THREADS / 32; ++warp) amax[0] = max(amax[0], of_warp[warp]);
        if (threadIdx.x == 0) scale[at.tile] = BlockScale(amax[0]).scale;
    }
    const BlockScale of_tile(amax[0]);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t row = at.row + 32 * i;
        if (row >= m) break;
        const BlockScale own = IS_PER_ROW ? BlockScale(amax[i]) : of_tile;
        if (IS_PER_ROW && threadIdx.x % 8 == 0)
            scale[(at.matrix * m + row) * (n / TILE) + at.column / TILE] = own.scale;
        const uint4 codes = quantize16(v[i], own.inverse);
        if (IS_WIDE) {
            if (at.column < n) *reinterpret_cast<uint4*>(values + row * n + at.column) = codes;
        } else {
            const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                if (at.column + j < n)
                    values[row * n + at.column + j] = static_cast<uint8_t>(words[j / 4] >> 8 * (j % 4));
        }
    }
}

template <typename T, bool IS_PER_ROW, bool IS_WIDE>
__global__ void __launch_bounds__(THREADS) dequantize_kernel(const uint8_t* values,  // [batch, m, n], e4m3
                                                             const float* scale,     // a row's n / 128, or a tile's
                                                             T* out,                 // [batch, m, n], out
                                                             int64_t m, int64_t n) {
    const Position at(n);
    values += at.matrix * m * n;
    out += at.matrix * m * n;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const int64_t row = at.row + 32 * i;
        if (row >= m || at.column >= n) break;
        const float own = scale[IS_PER_ROW ? (at.matrix * m + row) * (n / TILE) + at.column / TILE : at.tile];
        if (IS_WIDE) {
            float v[COLUMNS];
            dequantize16(__ldg(reinterpret_cast<const uint4*>(values + row * n + at.column)), own, v);
            store16(out + row * n + at.column, v);
        } else {
            for (int64_t column = at.column; column < min(at.column + COLUMNS, n); ++column)
                store(out + row * n + column, e4m3_to_float(values[row * n + column]) * own);
        }
    }
}

template <typename T>
int quantize(const T* x, uint8_t* values, float* scale, int64_t batch, int64_t m, int64_t n, int64_t block_rows,
             cudaStream_t stream) {
    const dim3 grid(ceil_div(m, TILE) * ceil_div(n, TILE), batch);
    const auto kernel = block_rows == 1 ? quantize_kernel<T, true, true>
                        : n % 16 == 0   ? quantize_kernel<T, false, true>
                                        : quantize_kernel<T, false, false>;
    launch(kernel, grid, THREADS, stream, x, values, scale, m, n);
    return cudaGetLastError();
}

template <typename T>
int dequantize(const uint8_t* values, const float* scale, T* out, int64_t batch, int64_t m, int64_t n,
               int64_t block_rows, cudaStream_t stream) {
    const dim3 grid(ceil_div(m, TILE) * ceil_div(n, TILE), batch);
    const auto kernel = block_rows == 1 ? dequantize_kernel<T, true, true>
                        : n % 16 == 0   ? dequantize_kernel<T, false, true>
                                        : dequantize_kernel<T, false, false>;
    launch(kernel, grid, THREADS, stream, values, scale, out, m, n);
    return cudaGetLastError();
}

}  // namespace

// block_rows is 1 (n divisible by 128) or 128; batch is at most 65535, and one when block_rows is 1.

R1_EXPORT int r1_fp8_quantize_bf16(const __nv_bfloat16* x, uint8_t* values, float* scale, int64_t batch, int64_t m,
                                   int64_t n, int64_t block_rows, cudaStream_t stream) {
    return quantize(x, values, scale, batch, m, n, block_rows, stream);
}

R1_EXPORT int r1_fp8_quantize_f32(const float* x, uint8_t* values, float* scale, int64_t batch, int64_t m, int64_t n,
                                  int64_t block_rows, cudaStream_t stream) {
    return quantize(x, values, scale, batch, m, n, block_rows, stream);
}

R1_EXPORT int r1_fp8_dequantize_bf16(const uint8_t* values, const float* scale, __nv_bfloat16* out, int64_t batch,
                                     int64_t m, int64_t n, int64_t block_rows, cudaStream_t stream) {
    return dequantize(values, scale, out, batch, m, n, block_rows, stream);
}

R1_EXPORT int r1_fp8_dequantize_f32(const uint8_t* values, const float* scale, float* out, int64_t batch, int64_t m,
                                    int64_t n, int64_t block_rows, cudaStream_t stream) {
    return dequantize(values, scale, out, batch, m, n, block_rows, stream);
}
