// Threads that share out a step's work, piece by piece and phase by phase.
//
//     phase 1   thread 0  [ own pieces, front to back | then what thread 1 has not begun ]
//               thread 1  [ own pieces                |     or thread 0                  ]     all pieces done:
//     phase 2   ...
//
// A usual barrier waits for threads, and one that does not run, because another process has its core, holds up all.
// Here a phase ends when its work is done, whoever did it: a thread that sleeps between two pieces delays nobody, and
// finds, when it comes back, that there is nothing left. Own pieces are the same from step to step, so that a core
// finds their weights in its cache where it can.
//
// One that sleeps in the middle of a piece still delays the others, and they measure for how long: see pace.hpp.
#pragma once

#include "batch.hpp"
#include "pace.hpp"
#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <sched.h>

static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A stopwatch over a phase, or over a region. It does nothing, unless compiled with PHASE_TIMES: then tools/phase_times.py
// finds the nanoseconds that each thread worked and waited, phase by phase.
#ifdef PHASE_TIMES
struct PhaseTimes {
    static constexpr int THREADS = 8, PHASES = 2048;
    int64_t regions, total, work[THREADS][PHASES], wait[THREADS][PHASES];
};
inline PhaseTimes phase_times;
extern "C" __attribute__((used)) inline PhaseTimes* kernels_phase_times() { return &phase_times; }

class PhaseClock {
  public:
    void work_ends() { finished = now_ns(); }
    void phase_ends(int thread, int phase) {
        if (thread >= PhaseTimes::THREADS || phase >= PhaseTimes::PHASES) return;
        phase_times.work[thread][phase] += finished - started;
        phase_times.wait[thread][phase] += now_ns() - finished;
    }
    void region_ends() { phase_times.regions++, phase_times.total += now_ns() - started; }

  private:
    const int64_t started = now_ns();
    int64_t finished = 0;
};
#else
struct PhaseClock {
    void work_ends() {}
    void phase_ends(int, int) {}
    void region_ends() {}
};
#endif

// One parallel region: `num_phases` calls of Member::share by each of its threads.
class Team {
  public:
    // `counters`: room for `num_counters(num_phases, num_threads)` of them.
    Team(std::atomic<int>* counters, int num_phases, int num_threads)
        : num_threads(num_threads), watch(num_threads), num_phases(num_phases), counters(counters) {
        for (int64_t i = 0; i < num_counters(num_phases, num_threads); i++) new (counters + i) std::atomic<int>(0);
    }
    // What each thread has taken of its own in each phase, on cache lines of its own; and what all have done.
    static int64_t num_counters(int num_phases, int num_threads) {
        return (int64_t)stride(num_phases) * (num_threads + 1);
    }

    // f(member) on all threads that are worth it.
    template <class F> void run(F&& f);

    const int num_threads;
    Watch watch;

  private:
    friend class Member;
    static int stride(int num_phases) { return (num_phases + 15) / 16 * 16; }
    std::atomic<int>& taken(int phase, int thread) { return counters[thread * stride(num_phases) + phase]; }
    std::atomic<int>& done(int phase) { return counters[num_threads * stride(num_phases) + phase]; }

    const int num_phases;
    std::atomic<int>* const counters;
};

// A thread in a team. All members call `share` with the same arguments, in the same order.
class Member {
  public:
    Member(Team& team, int thread) : team(team), thread(thread) {}

    // f(first, last) for all pieces [0, num_pieces), at most `grain` at a time. Returns when all are done; or at once,
    // where this thread is one too many.
    template <class F> void share(int num_pieces, int grain, F&& f) {
        share(num_pieces, grain, team.num_threads, true, f);
    }

    // The same, in order: the next piece goes to whoever comes first. For pieces of very different sizes; waiting for
    // a long one says nothing about who runs, and is not counted.
    template <class F> void share_in_order(int num_pieces, F&& f) { share(num_pieces, 1, 1, false, f); }

    // Memory that this thread will read soon: fetched while it waits for others.
    void expect(const char* from, int64_t bytes) { soon = from, soon_end = from + bytes; }

    Team& team;
    const int thread;

  private:
    template <class F> void share(int num_pieces, int grain, int num_owners, bool are_short, F&& f) {
        const int number = phase++;
        PhaseClock clock;
        if (team.num_threads == 1) {
            if (num_pieces > 0) f(0, num_pieces);
            clock.work_ends();
            return clock.phase_ends(thread, number);
        }
        int count = 0;
        for (int i = 0; i < num_owners; i++) {
            const int owner = (thread + i) % num_owners;
            const int start = (int)((int64_t)num_pieces * owner / num_owners);
            const int end = (int)((int64_t)num_pieces * (owner + 1) / num_owners);
            const int step = i == 0 ? grain : 1;            // what is left of another's is shared out finely
            std::atomic<int>& taken = team.taken(number, owner);
            while (start + taken.load(std::memory_order_relaxed) < end) {
                if (team.watch.retired(thread)) return finish(number, count);
                const int first = start + taken.fetch_add(step, std::memory_order_relaxed);
                if (first >= end) break;
                const int last = std::min(end, first + step);
                f(first, last);
                count += last - first;
            }
        }
        finish(number, count);
        clock.work_ends();
        if (!team.watch.retired(thread)) wait(number, num_pieces, are_short);
        clock.phase_ends(thread, number);
    }

    void finish(int number, int count) {
        if (count > 0) team.done(number).fetch_add(count, std::memory_order_acq_rel);
    }

    // Short waits are the rule, and sleeping would take longer than they do. A long one is for a thread that does not
    // run: then this core may be what it needs.
    void wait(int number, int num_pieces, bool are_short) {
        std::atomic<int>& done = team.done(number);
        for (int i = 0; i < SPINS; i++) {
            if (done.load(std::memory_order_acquire) == num_pieces) return;
            if (soon < soon_end) fetch();
            else relax();
        }
        const int64_t start = now_ns();
        while (done.load(std::memory_order_acquire) != num_pieces) {
            sched_yield();
            if (team.watch.retired(thread)) return;
        }
        if (are_short) team.watch.waited(start);
    }

    void fetch() {
        for (int i = 0; i < 4; i++, soon += 64) __builtin_prefetch(soon, 0, 2);
    }

    static constexpr int SPINS = 2000;          // some 20 to 80 microseconds
    int phase = 0;
    const char *soon = nullptr, *soon_end = nullptr;
};

template <class F> void Team::run(F&& f) {
    PhaseClock clock;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        Member member(*this, omp_get_thread_num());
        f(member);
    }
    watch.end();
    clock.region_ends();
}
