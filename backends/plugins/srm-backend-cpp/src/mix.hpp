// recurrent_mix, and recurrent_step as its case T = 1. A row head weighs what goes into its state, a col head what
// comes out: with (w, 1) for a row head and (1, w) for a col head, s' = w_in * x + d * s and y = w_out * s' + b for
// both.
// Backwards, with a the gradient of s': a[t] = w_out[t] * dy[t] + d * a[t+1], dx = w_in * a, dd = sum(a * s),
// dw = sum(a * x) of a row head and sum(dy * s') of a col head, db = sum(dy).
#pragma once

#include <cmath>
#include <vector>

#include "sequences.hpp"
#include "sums.hpp"
#include "sweep.hpp"

namespace srm {

// What is given of each head, and at which position each sequence begins. n.width is heads * width.
template <class T> struct MixHeads {
    const T *weight, *bias, *decay;  // (H, L), (H, L), (H,)
    const bool* is_row;              // (H,)
    const int64_t* starts;           // (B,)
    Sequences n;
    long heads, width, positions;

    double work() const { return static_cast<double>(n.batch * n.row(1, 0)) * 4; }

    // Of a position out of range every weight is NaN; far ones are told before t is added, which could overflow.
    bool known(long b, long t) const {
        const int64_t start = starts[b];
        return start >= -t && start < positions - t;
    }

    T at(const T* parameter, long b, long t, long h) const {
        return known(b, t) ? parameter[h * positions + starts[b] + t] : static_cast<T>(NAN);
    }
    T in(long b, long t, long h) const { return is_row[h] ? at(weight, b, t, h) : T(1); }
    T out(long b, long t, long h) const { return is_row[h] ? T(1) : at(weight, b, t, h); }
};

// f(b, heads); sequences are cut only if there are fewer than threads.
template <class T, class F> void for_each_heads(const MixHeads<T>& of, const F& f) {
    const int threads = threads_for(of.work());
    const long cuts = cuts_for(threads, of.n.batch, of.heads);
    for_each(of.n.batch * cuts, threads, [&](long task) {
        const Range heads = part(of.heads, task % cuts, cuts);
        if (heads.begin < heads.end) f(task / cuts, heads);
    });
}

// A few channels of one step of one head. states may be null.
template <class T> struct MixRow {
    T w_in, w_out, bias, d;
    const T* x;
    T *y, *states;

    template <class V> V operator()(long k, V s) const {
        s = splat<V>(w_in) * load<V>(x + k) + splat<V>(d) * s;
        if (states) store(states + k, s);
        store<V>(y + k, splat<V>(w_out) * s + splat<V>(bias));
        return s;
    }
};

template <class T> struct MixRowBackward {
    T w_in, w_out, d;
    const T* d_y;
    T *a, *d_x;

    template <class V> V operator()(long k, V s) const {
        s = splat<V>(w_out) * load<V>(d_y + k) + s;
        store(a + k, s);
        store<V>(d_x + k, splat<V>(w_in) * s);
        return splat<V>(d) * s;
    }
};

// x, y, states: (B, T, H, D), states may be null. state (B, H, D): the initial one, and in the end the final one.
template <class T> void mix(const MixHeads<T>& of, const T* x, T* state, T* y, T* states) {
    const Sequences& n = of.n;
    for_each_heads(of, [&](long b, Range heads) {
        const Range channels{heads.begin * of.width, heads.end * of.width};
        const auto step = [&](long t, long head, long channel) {
            const long h = heads.begin + head, here = n.row(b, t) + channels.begin + channel;
            const T w_in = of.in(b, t, h), w_out = of.out(b, t, h), bias = of.at(of.bias, b, t, h);
            return MixRow<T>{w_in, w_out, bias, of.decay[h], x + here, y + here, states ? states + here : nullptr};
        };
        sweep(n.length(b), heads.end - heads.begin, of.width, state + b * n.width + channels.begin, step);
        clear_beyond(n, b, n.width, channels, y);
    });
}

// The gradients of the states, a (B, T, H, D), and of x; d_state (B, H, D): of the final one, in the end of the
// initial.
template <class T> void mix_states_backward(const MixHeads<T>& of, const T* d_y, T* d_state, T* a, T* d_x) {
    const Sequences& n = of.n;
    for_each_heads(of, [&](long b, Range heads) {
        const Range channels{heads.begin * of.width, heads.end * of.width};
        const auto step = [&](long i, long head, long channel) {
            const long t = n.length(b) - 1 - i, h = heads.begin + head, here = n.row(b, t) + channels.begin + channel;
            return MixRowBackward<T>{of.in(b, t, h), of.out(b, t, h), of.decay[h], d_y + here, a + here, d_x + here};
        };
        sweep(n.length(b), heads.end - heads.begin, of.width, d_state + b * n.width + channels.begin, step);
        clear_beyond(n, b, n.width, channels, d_x);
    });
}

template <class T> Total dot(long n, const T* a, const T* b) {
    return sum_of(n, [=](long c) { return static_cast<double>(a[c]) * static_cast<double>(b[c]); });
}

template <class T> struct MixGradients {
    T *weight, *bias, *decay;  // (H, L), (H, L), (H,)
};

// The gradients of the parameters, head by head: sums in the order of sequences and steps.
template <class T>
void mix_parameters_backward(
    const MixHeads<T>& of, const T* x, const T* initial, const T* states, const T* d_y, const T* a,
    const MixGradients<T>& out) {
    const Sequences& n = of.n;
    const long D = of.width, L = of.positions;
    std::vector<Total> sums(static_cast<size_t>(of.heads * 2 * L));
    for_each(of.heads, threads_for(of.work()), [&](long h) {
        Total d_decay, *d_weight = sums.data() + h * 2 * L, *d_bias = d_weight + L;
        for (long b = 0; b < n.batch; ++b) {
            const T* before = initial + b * n.width + h * D;
            for (long t = 0; t < n.length(b); ++t) {
                const long here = n.row(b, t) + h * D;
                const T *left = (of.is_row[h] ? a : d_y) + here, *right = (of.is_row[h] ? x : states) + here;
                d_decay.add(dot(D, a + here, before));
                before = states + here;
                if (!of.known(b, t)) continue;
                d_weight[of.starts[b] + t].add(dot(D, left, right));
                d_bias[of.starts[b] + t].add(sum_of(D, [dy = d_y + here](long c) { return double(dy[c]); }));
            }
        }
        out.decay[h] = static_cast<T>(d_decay.value());
        for (long p = 0; p < L; ++p) {
            out.weight[h * L + p] = static_cast<T>(d_weight[p].value());
            out.bias[h * L + p] = static_cast<T>(d_bias[p].value());
        }
    });
}

}  // namespace srm
