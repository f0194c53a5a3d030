// The threads of one parallel region, in step: they share out a phase's work, and enter the next when
// all of it is done. Nobody waits for a thread that has none of it in hand: on a busy machine one may
// not be running for milliseconds, which at hundreds of phases a pass would be all the time there is.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace specserve {

// What the threads have in common. `num_phases` calls of `share` at most.
class Board {
   public:
    Board(int64_t num_phases, int num_threads)
        : num_threads_(num_threads), claimed_(num_phases * num_threads), done_(num_phases) {}

   private:
    friend class Team;
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };
    int num_threads_;
    std::vector<Counter> claimed_;  // [phase][range]
    std::vector<Counter> done_;     // [phase]
};

// One thread's view of it.
class Team {
   public:
    Team(Board& board, int thread) : board_(board), thread_(thread) {}

    // Calls work(i) for each i below `count`, once in the team, and returns when all are done.
    // A thread takes its own consecutive range first (its prefetches run ahead there), then helps
    // the others with theirs.
    template <typename Work>
    void share(int64_t count, const Work& work) {
        const int num_threads = board_.num_threads_;
        auto* claimed = &board_.claimed_[phase_ * num_threads];
        auto& done = board_.done_[phase_++].value;
        int64_t own = 0;
        for (int turn = 0; turn < num_threads; ++turn) {
            const int range = (thread_ + turn) % num_threads;
            const int64_t first = count * range / num_threads;
            const int64_t size = count * (range + 1) / num_threads - first;
            auto& next = claimed[range].value;
            while (next.load(std::memory_order_relaxed) < size) {
                const int64_t at = next.fetch_add(1, std::memory_order_relaxed);
                if (at >= size) break;
                work(first + at);
                ++own;
            }
        }
        if (own) done.fetch_add(own, std::memory_order_release);
        for (int spins = 0; done.load(std::memory_order_acquire) < count; ++spins)
            if (spins < kSpins)
                pause();
            else
                std::this_thread::yield();  // perhaps to the one that is waited for
    }

   private:
    static constexpr int kSpins = 2000;  // some tens of microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    Board& board_;
    int thread_;
    int64_t phase_ = 0;
};

// Runs body(team) on `num_threads` threads of the OpenMP pool, or as many as it gives.
template <typename Body>
void run_team(int64_t num_phases, int num_threads, const Body& body) {
    Board board(num_phases, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        // Ranges are dealt for `num_threads`; fewer threads take them all the same.
        Team team(board, omp_get_thread_num());
        body(team);
    }
}

}  // namespace specserve
