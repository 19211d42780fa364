// Sequences of different lengths in one batch, (B, T, D).
#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.hpp"

namespace srm {

struct Sequences {
    long batch, steps, width;  // width: channels
    const int64_t* lengths;    // (B,) or null

    long length(long b) const { return lengths ? std::clamp<long>(static_cast<long>(lengths[b]), 0, steps) : steps; }
    bool runs(long b, long t) const { return !lengths || t < length(b); }
    long row(long b, long t) const { return (b * steps + t) * width; }

    // The state before step t.
    template <class T> const T* before(const T* initial, const T* states, long b, long t) const {
        return t ? states + row(b, t - 1) : initial + b * width;
    }
};

// Zeros beyond the length of sequence b, in some of the channels of rows (B, T, width).
template <class T> void clear_beyond(const Sequences& n, long b, long width, Range channels, T* rows) {
    for (long t = n.length(b); t < n.steps; ++t) {
        T* row = rows + (b * n.steps + t) * width;
        std::fill(row + channels.begin, row + channels.end, T(0));
    }
}

// The state at each sequence's length.
template <class T> void last_states(const Sequences& n, const T* initial, const T* states, T* last) {
    for (long b = 0; b < n.batch; ++b) {
        const T* from = n.length(b) ? states + n.row(b, n.length(b) - 1) : initial + b * n.width;
        std::copy(from, from + n.width, last + b * n.width);
    }
}

}  // namespace srm
