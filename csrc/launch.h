// How launchers start kernels. tests/csrc/cuda_runtime.h executes the same calls on a CPU, so csrc/ keeps to what it
// has: one-dimensional blocks of whole warps, static shared memory, and warp functions that all 32 lanes take part in.
#pragma once

#include "export.h"

template <typename... P, typename... A>
inline void launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t stream, A... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchKernelEx(&config, kernel, args...);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

constexpr unsigned ALL_LANES = 0xffffffffu;
