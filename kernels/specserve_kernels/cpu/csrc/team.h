// The threads of one parallel region, synchronized by phases: they share the work of a phase and
// enter the next phase when all of it is done. A thread waits only for work that another thread has
// begun, never for a thread that has begun none: on a busy machine a thread may not be scheduled
// for milliseconds, and a forward pass has hundreds of phases.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace specserve {

// The state that the threads share. Allows at most `num_phases` calls of `share`.
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
    std::vector<Counter> claimed_;  // [phase][range], work items begun
    std::vector<Counter> done_;     // [phase], work items finished
};

// One thread's access to the board.
class Team {
   public:
    Team(Board& board, int thread) : board_(board), thread_(thread) {}

    // Calls work(i) for each i below `count`, each once in the whole team, and returns when all
    // calls are finished. A thread first takes its own consecutive range, where its prefetches run
    // ahead, and then helps with the ranges of the other threads.
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
                std::this_thread::yield();  // possibly to the thread that is awaited
    }

   private:
    static constexpr int kSpins = 2000;  // iterations, some tens of microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    Board& board_;
    int thread_;
    int64_t phase_ = 0;
};

// Runs body(team) on `num_threads` threads of the OpenMP pool, or on fewer if it provides fewer.
template <typename Body>
void run_team(int64_t num_phases, int num_threads, const Body& body) {
    Board board(num_phases, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        // There are `num_threads` ranges; if fewer threads run, they still process all of them.
        Team team(board, omp_get_thread_num());
        body(team);
    }
}

}  // namespace specserve
