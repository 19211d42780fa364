// Threads: how many a piece of work is worth, which part of it each one does, and a barrier for very short steps.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <thread>

namespace srm {

// Set in the child of a fork, where OpenMP's threads do not exist although its runtime believes so.
extern std::atomic<bool> forked;

constexpr double GRAIN = 65536;  // multiplications, or bytes, that are worth a thread: some 20 microseconds

inline int threads_for(double work) {
    if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
    return static_cast<int>(std::max(1.0, std::min<double>(omp_get_max_threads(), work / GRAIN)));
}

// f(me, all) on each of a team; on the caller alone without a word to OpenMP.
template <class F> void team(int threads, const F& f) {
    if (threads <= 1) return f(0, 1);
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num(), omp_get_num_threads());
}

struct Range {
    long begin, end;
};

// Part `me` of 0 ... n-1 in `all` parts, cut at multiples of `unit`.
inline Range part(long n, long me, long all, long unit = 1) {
    const long units = (n + unit - 1) / unit;
    return {std::min(n, units * me / all * unit), std::min(n, units * (me + 1) / all * unit)};
}

// Into how many parts each sequence of a batch is cut, so that each thread has one; `most` are possible.
inline long cuts_for(int threads, long batch, long most) {
    return std::max(1L, std::min(most, batch ? (threads + batch - 1) / batch : 1));
}

// f(i) for each of `tasks`, neighbours on the same thread: it is the first to touch what it writes.
template <class F> void for_each(long tasks, int threads, const F& f) {
    team(static_cast<int>(std::min<long>(threads, tasks)), [&](int me, int all) {
        const Range mine = part(tasks, me, all);
        for (long i = mine.begin; i < mine.end; ++i) f(i);
    });
}

// A step of a recurrence may take 5 microseconds, so waiting is spinning, at first.
class Barrier {
  public:
    void wait(int size) {
        if (size == 1) return;
        const unsigned now = round_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            waiting_.store(0, std::memory_order_relaxed);
            round_.store(now + 1, std::memory_order_release);
            return;
        }
        for (long spins = 0; round_.load(std::memory_order_acquire) == now; ++spins)
            if (spins > PATIENCE) std::this_thread::yield();
    }

  private:
    static constexpr long PATIENCE = 4096;
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace srm
