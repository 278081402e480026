// The part of CUDA that csrc/ uses, executed on the host: for tests only.
//
// A .cu file compiled with this folder first on the include path becomes plain C++. Each CUDA thread is a fiber; a
// block's fibers run in turn and meet at __syncthreads and at the warp functions, which need all 32 lanes. Blocks run
// one after the other, so __shared__ is a static variable that holds garbage of the block before. A deadlock, a warp
// function without all lanes and a launch that a GPU refuses abort with a message. Order 1 runs blocks and threads
// backwards, order 2 in a shuffled order: a result that needs a missing barrier changes.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr int LANES = 32;

struct Fiber {
    ucontext_t start;
    void* place[5];  // of __builtin_setjmp
    dim3 index;
    bool is_started = false, is_done = true;
};

struct Warp {  // of the exchange that its lanes are in
    uint64_t given[LANES], taken[LANES];
    int arrived = 0;
    long generation = 0;
};

inline std::vector<Fiber*> fibers;
inline std::vector<Warp> warps;
inline Fiber* current;
inline void* scheduler[5];
inline std::function<void()> body;
inline int order = 0;
inline std::mt19937 shuffler;
inline int live, arrived;       // threads of the block that have not returned; at __syncthreads
inline long generation, steps;  // of __syncthreads; things that happened, to see a deadlock
inline cudaError_t last_error = cudaSuccess;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: block %u %u, thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
    std::abort();
}

// A jump between stacks costs nanoseconds; swapcontext would enter the kernel for the signal mask, and the address
// sanitizer would clean a whole stack at every longjmp of the C library.
#define CUDA_ON_CPU_SWITCH __attribute__((noinline, no_sanitize("address", "alignment"))) inline

[[noreturn]] CUDA_ON_CPU_SWITCH void jump(void** place) { __builtin_longjmp(place, 1); }

CUDA_ON_CPU_SWITCH void yield() {
    if (!__builtin_setjmp(current->place)) jump(scheduler);
}

inline void release_block() {
    arrived = 0;
    ++generation;
    ++steps;
}

inline void fiber_main() {
    for (;;) {
        body();
        current->is_done = true;
        --live;
        ++steps;
        if (live && arrived == live) release_block();
        yield();
    }
}

CUDA_ON_CPU_SWITCH void resume(Fiber* fiber) {
    current = fiber;
    threadIdx = fiber->index;
    if (__builtin_setjmp(scheduler)) return;
    if (fiber->is_started) jump(fiber->place);
    fiber->is_started = true;
    setcontext(&fiber->start);
}

inline void add_fibers(size_t count) {
    while (fibers.size() < count) {
        auto* fiber = new Fiber;
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for a stack");
        getcontext(&fiber->start);
        fiber->start.uc_stack.ss_sp = stack;
        fiber->start.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber->start, fiber_main, 0);
        fibers.push_back(fiber);
    }
}

inline std::vector<size_t> turns(size_t count) {
    std::vector<size_t> out(count);
    std::iota(out.begin(), out.end(), size_t{0});
    if (order == 1) std::reverse(out.begin(), out.end());
    if (order == 2) std::shuffle(out.begin(), out.end(), shuffler);
    return out;
}

inline void run_block(size_t threads) {
    warps.assign(threads / LANES, Warp{});
    arrived = 0;
    live = static_cast<int>(threads);
    for (size_t i = 0; i < threads; ++i) {
        fibers[i]->is_done = false;
        fibers[i]->index = dim3(static_cast<unsigned>(i), 0, 0);
    }
    const auto who = turns(threads);
    while (live) {
        const long before = steps;
        for (size_t i : who)
            if (!fibers[i]->is_done) resume(fibers[i]);
        if (steps == before) fail("deadlock: a barrier or warp function waits for threads that never come");
    }
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> run) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu || block.x % LANES ||
        !block.x || block.x > 1024 || block.y != 1 || block.z != 1 || config.dynamicSmemBytes)
        return last_error = cudaErrorInvalidConfiguration;
    add_fibers(block.x);
    body = std::move(run);
    blockDim = block;
    gridDim = grid;
    const size_t blocks = size_t{grid.x} * grid.y * grid.z;
    for (size_t i : turns(blocks)) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        run_block(block.x);
    }
    return cudaSuccess;
}

// Gives one value for each lane and returns when all 32 have; what they gave is in taken[].
template <typename T>
inline const uint64_t* exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= 8);
    if (mask != 0xffffffffu) fail("a warp function needs the mask of all lanes");
    Warp& warp = warps[threadIdx.x / LANES];
    const long own = warp.generation;
    uint64_t& slot = warp.given[threadIdx.x % LANES];
    slot = 0;
    std::memcpy(&slot, &value, sizeof(T));
    ++steps;
    if (++warp.arrived == LANES) {
        std::memcpy(warp.taken, warp.given, sizeof(warp.taken));
        warp.arrived = 0;
        ++warp.generation;
    }
    while (warp.generation == own) yield();
    return warp.taken;
}

template <typename T>
inline T as(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace cuda_on_cpu

extern "C" inline __attribute__((used, visibility("default"))) void cuda_on_cpu_order(int order) {
    cuda_on_cpu::order = order;
    cuda_on_cpu::shuffler.seed(1);
}

template <typename... P, typename... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... args) {
    return cuda_on_cpu::launch(*config, [=] { kernel(P(args)...); });
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}

inline void __syncthreads() {
    using namespace cuda_on_cpu;
    const long own = generation;
    ++steps;
    if (++arrived == live) release_block();
    while (generation == own) yield();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::exchange(mask, 0); }

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
    return cuda_on_cpu::as<T>(cuda_on_cpu::exchange(mask, value)[lane & 31]);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return cuda_on_cpu::as<T>(cuda_on_cpu::exchange(mask, value)[(threadIdx.x & 31) ^ lanes]);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, value);
    const unsigned lane = threadIdx.x & 31;
    return cuda_on_cpu::as<T>(all[lane >= lanes ? lane - lanes : lane]);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, value);
    const unsigned lane = threadIdx.x & 31;
    return cuda_on_cpu::as<T>(all[lane + lanes < 32 ? lane + lanes : lane]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, predicate != 0);
    unsigned out = 0;
    for (int lane = 0; lane < 32; ++lane) out |= all[lane] ? 1u << lane : 0u;
    return out;
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, value);
    unsigned out = 0;
    for (int lane = 0; lane < 32; ++lane) out |= all[lane] == all[threadIdx.x & 31] ? 1u << lane : 0u;
    return out;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, value);
    return static_cast<unsigned>(*std::max_element(all, all + 32));
}
inline int __reduce_add_sync(unsigned mask, int value) {
    const uint64_t* all = cuda_on_cpu::exchange(mask, value);
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += cuda_on_cpu::as<int>(all[lane]);
    return sum;
}

template <typename T>
inline T atomicAdd(T* to, T value) {
    const T old = *to;
    *to += value;
    return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::as<float>(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
inline T __ldg(const T* from) {
    return *from;
}
template <typename T>
inline T __ldcs(const T* from) {
    return *from;
}
template <typename T>
inline void __stcs(T* to, T value) {
    *to = value;
}
