// The loop over time of a recurrence whose channels do not meet: `scan` and `recurrent_mix`, forward and backward.
#pragma once

#include <algorithm>

#include "vec.hpp"

namespace srm {

// N vectors of states (or numbers) stay in registers for the steps begin ... end-1.
template <class V, int N, class T, class Step>
inline void advance(long begin, long end, long head, long channel, T* state, const Step& step) {
    constexpr long lanes = sizeof(V) / sizeof(T);
    V s[N];
    for (int n = 0; n < N; ++n) s[n] = load<V>(state + n * lanes);
    for (long t = begin; t < end; ++t) {
        const auto row = step(t, head, channel);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) s[n] = row(n * lanes, s[n]);
    }
    for (int n = 0; n < N; ++n) store(state + n * lanes, s[n]);
}

// state[c] = step(t, head, channel)(c - channel, state[c]) for t = 0 ... steps-1 and all heads * width channels c.
// `step` looks up what it needs of a step once for a few channels; what it returns takes vectors and numbers alike.
template <class T, class Step> void sweep(long steps, long heads, long width, T* state, const Step& step) {
    // Memory is fastest row by row; a short row's states stay in registers for the whole sequence.
    const long together = heads * width <= 4 * LANES<T> ? steps : 1;
    for (long begin = 0; begin < steps; begin += together) {
        const long end = std::min(steps, begin + together);
        for (long head = 0; head < heads; ++head) {
            long channel = head * width;
            const long last = channel + width;
            for (; channel + 4 * LANES<T> <= last; channel += 4 * LANES<T>)
                advance<Vec<T>, 4>(begin, end, head, channel, state + channel, step);
            for (; channel + LANES<T> <= last; channel += LANES<T>)
                advance<Vec<T>, 1>(begin, end, head, channel, state + channel, step);
            for (; channel + 4 <= last; channel += 4) advance<T, 4>(begin, end, head, channel, state + channel, step);
            for (; channel < last; ++channel) advance<T, 1>(begin, end, head, channel, state + channel, step);
        }
    }
}

}  // namespace srm
