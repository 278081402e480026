// The caller's thread team: PyTorch's own OpenMP runtime. A second team would fight the first one for the cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace r1 {

// GOMP_parallel of libgomp; libomp and libiomp5 have it under the same name.
using RunTeam = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

struct Team {
    RunTeam run;
    int64_t threads;
};

// Calls body(0) ... body(pieces - 1), each once, on the threads of the team.
template <class Body>
void parallel(const Team& team, int64_t pieces, const Body& body) {
    if (team.threads == 1 || pieces == 1) {
        for (int64_t piece = 0; piece < pieces; ++piece) body(piece);
        return;
    }
    struct Work {
        const Body& body;
        int64_t pieces;
        std::atomic<int64_t> next{0};
    } work{body, pieces};
    auto take = [](void* data) {
        Work& work = *static_cast<Work*>(data);
        for (int64_t piece; (piece = work.next.fetch_add(1, std::memory_order_relaxed)) < work.pieces;) {
            work.body(piece);
        }
    };
    team.run(take, &work, static_cast<unsigned>(team.threads), 0);
}

}  // namespace r1
