// How many threads are worth using now: one that has to share its core with another process may cost more than it does.
//
//     all threads  -->  others wait for one a large part of the time  -->  one less, for a while  -->  tried again
//
// Waiting is measured, not guessed: neither the load that a system reports nor the number of its cores says whether a
// thread runs. The while is longer each time that the trial fails.
#pragma once

#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

static inline int64_t now_ns() {
    const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(since_start).count();
}

// What all engines of the process know: it is the machine's state, not an engine's. Relaxed: two engines that disagree
// for a step do no harm.
struct Pace {
    static constexpr int64_t SHORTEST = 50'000'000, LONGEST = 1'600'000'000;       // ns until the next trial
    static constexpr int64_t TRIAL = 5'000'000;                                     // ns of work that decide

    std::atomic<int> limit{1 << 30};            // threads
    std::atomic<int64_t> next_trial{0}, pause{SHORTEST}, tried{0};

    // At most `most`; one more than the limit where it is time to try.
    int num_threads(int most) const {
        const int known = limit;
        if (known >= most) return most;
        return known + (now_ns() >= next_trial);
    }

    // After a region of `used` threads, of which `worth` were worth it, that took `ns`.
    void learn(int used, int worth, int64_t ns) {
        const bool trial = used > limit;
        if (worth < used) {
            const int64_t wait = trial ? std::min<int64_t>(LONGEST, 2 * pause) : SHORTEST;
            limit = worth;
            pause = wait;
            next_trial = now_ns() + wait;
            tried = 0;
        } else if (trial && (tried += ns) > TRIAL) {
            limit = used;                       // the next trial, with one more, follows at once
            pause = SHORTEST;
            tried = 0;
        }
    }
};

inline Pace pace;

static inline int threads_worth_using() { return pace.num_threads(omp_get_max_threads()); }

// The waiting in one parallel region.
class Watch {
  public:
    explicit Watch(int num_threads)
        : num_threads(num_threads), worth(num_threads), start(num_threads > 1 ? now_ns() : 0) {}

    // Whether a thread is one too many. The last ones go; which one has no core does not matter, the system moves them.
    bool retired(int thread) const { return thread >= worth.load(std::memory_order_relaxed); }

    // A thread that has waited, from `since` on, for others to end a phase.
    void waited(int64_t since) {
        const int64_t now = now_ns();
        if (now - since < LONG) return;
        const int64_t total = lost += now - since;
        int known = worth;
        const bool too_much = known > 1 && total > ENOUGH && total * 3 > now - start;
        if (too_much && worth.compare_exchange_strong(known, known - 1)) lost = 0;
    }

    int num_worth() const { return worth; }

    void end() {
        if (num_threads > 1) pace.learn(num_threads, worth, now_ns() - start);
    }

  private:
    static constexpr int64_t LONG = 300'000;        // ns; pieces that are counted take less
    static constexpr int64_t ENOUGH = 2'000'000;    // ns
    const int num_threads;
    std::atomic<int> worth;
    std::atomic<int64_t> lost{0};
    const int64_t start;
};
