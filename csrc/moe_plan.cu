// The row of each choice (kernels/r1kernels/moe_plan): a histogram of every block of choices, a scan of the histograms
// over the blocks, and the choices written to their places. Counting decides every place, so the result is stable.
#include "launch.h"

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int CHUNKS = 4;                     // of 32 choices, one after the other in a warp
constexpr int CHOICES = WARPS * CHUNKS * 32;  // of a block
constexpr int MAX_EXPERTS = 1024;
constexpr int SCAN_EXPERTS = 8, SCAN_LANES = 32;  // a warp scans the blocks of one expert

// Choices of each expert in each block.
__global__ void __launch_bounds__(THREADS) count_kernel(const int* ids,   // [num_choices], -1: nowhere
                                                        int* histograms,  // [blocks, num_experts], out
                                                        int64_t num_choices, int num_experts) {
    __shared__ int count[MAX_EXPERTS];
    for (int e = threadIdx.x; e < num_experts; e += THREADS) count[e] = 0;
    __syncthreads();
    const int64_t first = int64_t{blockIdx.x} * CHOICES;
    for (int i = threadIdx.x; i < CHOICES && first + i < num_choices; i += THREADS) {
        const int id = ids[first + i];
        if (id >= 0) atomicAdd(&count[id], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += THREADS)
        histograms[int64_t{blockIdx.x} * num_experts + e] = count[e];
}

// Replaces each block's count by the sum of the blocks before it, for 8 experts a block of threads.
__global__ void __launch_bounds__(SCAN_EXPERTS* SCAN_LANES) scan_kernel(int* histograms,  // [blocks, num_experts]
                                                                        int* counts,      // [num_experts], out
                                                                        int64_t blocks, int num_experts) {
    const int lane = threadIdx.x % SCAN_LANES;
    const int e = blockIdx.x * SCAN_EXPERTS + threadIdx.x / SCAN_LANES;
    const int64_t part = ceil_div(blocks, SCAN_LANES);  // a lane's blocks lie together
    const int64_t begin = min(lane * part, blocks), end = e < num_experts ? min(begin + part, blocks) : begin;
    int sum = 0;
    for (int64_t b = begin; b < end; ++b) sum += histograms[b * num_experts + e];
    int before = sum;
#pragma unroll
    for (int lanes = 1; lanes < SCAN_LANES; lanes *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, before, lanes);
        if (lane >= lanes) before += other;
    }
    if (lane == SCAN_LANES - 1 && e < num_experts) counts[e] = before;
    before -= sum;
    for (int64_t b = begin; b < end; ++b) {
        const int own = histograms[b * num_experts + e];
        histograms[b * num_experts + e] = before;
        before += own;
    }
}

// first[e] = sum of the aligned counts before e; first[num_experts] = all. By the first warp.
__device__ void aligned_scan(const int* counts, int* first, int num_experts, int align) {
    if (threadIdx.x < 32) {
        int base = 0;
        for (int start = 0; start < num_experts; start += 32) {
            const int e = start + threadIdx.x;
            const int own = e < num_experts ? (counts[e] + align - 1) / align * align : 0;
            int sum = own;
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                const int other = __shfl_up_sync(ALL_LANES, sum, lanes);
                if (static_cast<int>(threadIdx.x) >= lanes) sum += other;
            }
            if (e < num_experts) first[e] = base + sum - own;
            base += __shfl_sync(ALL_LANES, sum, 31);
        }
        if (threadIdx.x == 0) first[num_experts] = base;
    }
}

// Each warp takes 128 neighbouring choices. Its place in an expert: the choices of the blocks before, of the warps
// before, of its own chunks before, and of its lanes before that go to the same expert.
__global__ void __launch_bounds__(THREADS) place_kernel(const int* ids,     // [num_choices]
                                                        const int* before,  // [blocks, num_experts]
                                                        const int* counts,  // [num_experts]
                                                        int* row_of,        // [num_choices], out
                                                        int* slot_of,       // [rows], out, filled with -1
                                                        int* expert_of,     // [rows], out, filled with -1
                                                        int* offsets,       // [num_experts + 1], out
                                                        int64_t num_choices, int num_experts, int align) {
    __shared__ int first[MAX_EXPERTS + 1];
    __shared__ int place[WARPS][MAX_EXPERTS];  // next place in the expert for a choice of this warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = lane; e < num_experts; e += 32) place[warp][e] = 0;
    aligned_scan(counts, first, num_experts, align);
    __syncthreads();
    if (blockIdx.x == 0)
        for (int e = threadIdx.x; e <= num_experts; e += THREADS) offsets[e] = first[e];

    const int64_t begin = int64_t{blockIdx.x} * CHOICES + warp * CHUNKS * 32 + lane;
    int id[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        id[i] = begin + 32 * i < num_choices ? ids[begin + 32 * i] : -1;
        if (id[i] >= 0) atomicAdd(&place[warp][id[i]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += THREADS) {
        int next = first[e] + before[int64_t{blockIdx.x} * num_experts + e];
        for (int w = 0; w < WARPS; ++w) {
            const int own = place[w][e];
            place[w][e] = next;
            next += own;
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int64_t slot = begin + 32 * i;
        const unsigned same = __match_any_sync(ALL_LANES, id[i]);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int row = id[i] >= 0 ? place[warp][id[i]] + rank : -1;
        __syncwarp();
        if (id[i] >= 0 && rank == 0) place[warp][id[i]] += __popc(same);
        __syncwarp();
        if (slot < num_choices) row_of[slot] = row;
        if (row >= 0) {
            slot_of[row] = static_cast<int>(slot);
            expert_of[row] = id[i];
        }
    }
}

}  // namespace

// workspace: ceil(num_choices / 1024) * num_experts ints. num_choices is at least 1.
R1_EXPORT int r1_moe_plan(const int* ids, int* workspace, int* row_of, int* slot_of, int* expert_of, int* offsets,
                          int* counts, int64_t num_choices, int64_t num_experts, int64_t align, int64_t num_rows,
                          cudaStream_t stream) {
    const int64_t blocks = ceil_div(num_choices, CHOICES);
    const int experts = static_cast<int>(num_experts);
    cudaMemsetAsync(slot_of, 0xff, num_rows * sizeof(int), stream);
    cudaMemsetAsync(expert_of, 0xff, num_rows * sizeof(int), stream);
    launch(count_kernel, dim3(blocks), THREADS, stream, ids, workspace, num_choices, experts);
    launch(scan_kernel, dim3(ceil_div(experts, SCAN_EXPERTS)), SCAN_EXPERTS * SCAN_LANES, stream, workspace, counts,
           blocks, experts);
    launch(place_kernel, dim3(blocks), THREADS, stream, ids, workspace, counts, row_of, slot_of, expert_of, offsets,
           num_choices, experts, static_cast<int>(align));
    return cudaGetLastError();
}
