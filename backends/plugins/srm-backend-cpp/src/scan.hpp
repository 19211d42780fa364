// scan: y[t] = g[t] * y[t-1] + x[t]; without tokens x = 0. Backwards, with a the gradient of a state:
// a[t] = dy[t] + g[t+1] * a[t+1], dx[t] = a[t], dg[t] = a[t] * y[t-1], summed where steps or channels share a gate.
#pragma once

#include <type_traits>

#include "sequences.hpp"
#include "sweep.hpp"

namespace srm {

// (B, T, D) in memory of any strides along B and T; along D 1, or 0 for one number that all channels see.
template <class T> struct Rows {
    const T* data = nullptr;
    long batch = 0, step = 0, channel = 1;

    const T* at(long b, long t, long c) const {
        return data ? data + b * batch + t * step + c * channel : nullptr;
    }
};

// In which order the steps of a sequence come.
struct Order {
    const Sequences& n;
    bool reverse;

    long at(long b, long i) const { return reverse ? n.length(b) - 1 - i : i; }
};

// f with the truth of `condition` as a constant.
template <class F> void with_constant(bool condition, const F& f) {
    condition ? f(std::true_type{}) : f(std::false_type{});
}

// f(b, channels) for ranges of channels; sequences are cut only if there are fewer than threads.
template <class T, class F> void for_each_range(const Sequences& n, const F& f) {
    const int threads = threads_for(static_cast<double>(n.batch * n.row(1, 0) * static_cast<long>(sizeof(T))));
    const long cuts = cuts_for(threads, n.batch, (n.width + 4 * LANES<T> - 1) / (4 * LANES<T>));
    for_each(n.batch * cuts, threads, [&](long task) {
        const Range channels = part(n.width, task % cuts, cuts, 4 * LANES<T>);
        if (channels.begin < channels.end) f(task / cuts, channels);
    });
}

// A few channels of one step. ONE_GATE: all channels share the gate.
template <bool ONE_GATE, class V, class T> V gate_at(const T* g, long k) {
    if constexpr (ONE_GATE) return splat<V>(*g);
    else return load<V>(g + k);
}

template <bool ONE_GATE, bool ADDS, class T> struct ScanRow {
    const T *g, *x;
    T* y;

    template <class V> V operator()(long k, V state) const {
        state = gate_at<ONE_GATE, V>(g, k) * state;
        if constexpr (ADDS) state = state + load<V>(x + k);
        store(y + k, state);
        return state;
    }
};

template <bool ONE_GATE, class T> struct ScanRowBackward {
    const T *g, *dy, *before;
    T *d_gates, *d_tokens;

    template <class V> V operator()(long k, V a) const {
        a = a + load<V>(dy + k);
        store(d_tokens + k, a);
        store<V>(d_gates + k, a * load<V>(before + k));
        return gate_at<ONE_GATE, V>(g, k) * a;
    }
};

// state (B, D): the initial one, and in the end the final one. Without tokens their data is null.
template <class T> void scan(const Order& order, Rows<T> gates, Rows<T> tokens, T* state, T* y) {
    const Sequences& n = order.n;
    const auto run = [&](auto one_gate, auto adds) {
        using Row = ScanRow<decltype(one_gate)::value, decltype(adds)::value, T>;
        for_each_range<T>(n, [&](long b, Range channels) {
            const auto step = [&](long i, long, long channel) {
                const long t = order.at(b, i), c = channels.begin + channel;
                return Row{gates.at(b, t, c), tokens.at(b, t, c), y + n.row(b, t) + c};
            };
            const long width = channels.end - channels.begin;
            sweep(n.length(b), 1, width, state + b * n.width + channels.begin, step);
            clear_beyond(n, b, n.width, channels, y);
        });
    };
    with_constant(gates.channel == 0, [&](auto one_gate) {
        with_constant(tokens.data != nullptr, [&](auto adds) { run(one_gate, adds); });
    });
}

// d_state (B, D): the gradient of the final state, and in the end of the initial one. y, d_gates, d_tokens: (B, T, D).
template <class T>
void scan_backward(
    const Order& order, Rows<T> gates, const T* start, const T* y, Rows<T> d_y, T* d_state, T* d_gates, T* d_tokens) {
    const Sequences& n = order.n;
    with_constant(gates.channel == 0, [&](auto one_gate) {
        using Row = ScanRowBackward<decltype(one_gate)::value, T>;
        for_each_range<T>(n, [&](long b, Range channels) {
            const long length = n.length(b);
            const auto step = [&](long i, long, long channel) {
                const long t = order.at(b, length - 1 - i), c = channels.begin + channel, here = n.row(b, t) + c;
                const T* before = i == length - 1 ? start + b * n.width : y + n.row(b, order.at(b, length - 2 - i));
                return Row{gates.at(b, t, c), d_y.at(b, t, c), before + c, d_gates + here, d_tokens + here};
            };
            sweep(length, 1, channels.end - channels.begin, d_state + b * n.width + channels.begin, step);
            for (T* rows : {d_gates, d_tokens}) clear_beyond(n, b, n.width, channels, rows);
        });
    });
}

}  // namespace srm
