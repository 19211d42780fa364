// A level of a hierarchical memory: means of windows of `pool` neighbouring slots of the level below, in one pass over
// the memory. A remainder is dropped.
#pragma once

#include <algorithm>

#include "buffer.hpp"
#include "threads.hpp"

namespace srm {

// mean (width,) of the slots of one window of `level` levels; `below` holds a mean for each lower level.
template <class T> void window_mean(const T* slots, int level, long window, long pool, long width, T* mean, T* below) {
    std::fill(mean, mean + width, T(0));
    const long step = window / pool;
    for (long i = 0; i < pool; ++i) {
        const T* part = slots + i * step * width;
        if (level > 1) {
            window_mean(part, level - 1, step, pool, width, below, below + width);
            part = below;
        }
#pragma omp simd
        for (long c = 0; c < width; ++c) mean[c] += part[c];
    }
    for (long c = 0; c < width; ++c) mean[c] /= static_cast<T>(pool);
}

// memory: `count` times (M, width); pooled: `count` times (windows, width), `level` levels above it.
template <class T>
void pool_levels(const T* memory, long count, long slots, long width, int level, long pool, long windows, T* pooled) {
    long window = 1;
    for (int i = 0; i < level; ++i) window *= pool;
    const int threads = threads_for(static_cast<double>(count * slots * width * sizeof(T)));
    const Buffer<T> below(threads * level * width);
    team(threads, [&](int me, int all) {
        const Range mine = part(count * windows, me, all);
        for (long i = mine.begin; i < mine.end; ++i) {
            const T* from = memory + (i / windows * slots + i % windows * window) * width;
            window_mean(from, level, window, pool, width, pooled + i * width, below.get() + me * level * width);
        }
    });
}

// The gradient of the memory: a slot of a window of `window` has its share of the pooled slot's, one beyond them 0.
template <class T>
void spread_level(const T* d_level, long count, long windows, long slots, long width, long window, T* d_memory) {
    for_each(count * slots, threads_for(static_cast<double>(count * slots * width * sizeof(T))), [&](long task) {
        const long at = task % slots / window;
        const T* from = d_level + (task / slots * windows + at) * width;
        T* to = d_memory + task * width;
        if (at >= windows) return void(std::fill(to, to + width, T(0)));
#pragma omp simd
        for (long c = 0; c < width; ++c) to[c] = from[c] / static_cast<T>(window);
    });
}

}  // namespace srm
