// The loop over time of `mdi_recurrence` and `lstm`, whose gates at each step come from a product with the state.
//
// Products that do not wait for the state are made for all steps beforehand (`project`). In the loop the weights
// of all gates of a few channels stand side by side in one panel, so that as soon as a panel has been multiplied these
// channels' gates are known, and their next state is computed while the sums are still in the cache.
//
// Threads share the sequences. Weights beyond the cache are shared instead: each thread has some channels of all
// sequences, and waits once a step for what the others' channels have become.
#pragma once

#include "product.hpp"
#include "sequences.hpp"

namespace srm {

constexpr long CACHE = 768 << 10;      // bytes of weights that a thread can read at each step
constexpr double WORTH_WAITING = 2e5;  // multiplications in a step beside which a barrier is little

// f(sequences, panels, wait) on each thread: all panels of its sequences, or its panels of all sequences. Then `wait`
// is for the other threads.
template <class T, class F> void in_shares(const Sequences& n, const Panels<T>& weights, const F& f) {
    const long size = weights.depth * weights.count * PANEL<T>, bytes = size * static_cast<long>(sizeof(T));
    const double step_work = static_cast<double>(n.batch * size);
    const int threads = threads_for(step_work * static_cast<double>(n.steps));
    const bool by_panels = (n.batch < threads || bytes > CACHE) && step_work > WORTH_WAITING;
    Barrier barrier;
    team(by_panels ? threads : static_cast<int>(std::min<long>(threads, n.batch)), [&](int me, int all) {
        if (by_panels) f(Range{0, n.batch}, part(weights.count, me, all), [&] { barrier.wait(all); });
        else f(part(n.batch, me, all), Range{0, weights.count}, [] {});
    });
}

// The weights of a state (G * D, D), element(row, k), so that a panel holds all G gates of PANEL / G channels.
template <class T, int GATES, class F> Panels<T> gate_panels(long width, const F& element) {
    constexpr long together = PANEL<T> / GATES;
    Panels<T> panels(width, (width + together - 1) / together * PANEL<T>);
    panels.pack([&](long k, long n) {
        const long channel = n / PANEL<T> * together + n % together, gate = n % PANEL<T> / together;
        return channel < width ? element(gate * width + channel, k) : T(0);
    });
    return panels;
}

// For each step: cell.advance(b, t, Range channels, product) with the products of the state for each gate,
// PANEL / GATES apart, or cell.skip(b, t, channels) beyond a length. The cell writes the state to states (B, T, D).
template <class T, class Cell>
void run(const Sequences& n, const Panels<T>& weights, const T* initial, const T* states, const Cell& cell) {
    constexpr long together = PANEL<T> / Cell::GATES;
    in_shares(n, weights, [&](Range sequences, Range panels, const auto& wait) {
        for (long t = 0; t < n.steps; ++t) {
            const Left<T> before{n.before(initial, states, sequences.begin, t), t ? n.steps * n.width : n.width, 1};
            for (long p = panels.begin; p < panels.end; ++p) {
                const Range channels{p * together, std::min(n.width, (p + 1) * together)};
                const auto emit = [&](long m, const T* product) {
                    const long b = sequences.begin + m;
                    if (n.runs(b, t)) cell.advance(b, t, channels, product);
                    else cell.skip(b, t, channels);
                };
                rows_times_panel(before, sequences.end - sequences.begin, weights.panel(p), weights.depth, emit);
            }
            wait();
        }
    });
}

// The same from the last step to the first. cell.pull(b, t, channels) writes the gradients of the gates to
// d_gates (B, T, G * D) and to d_state (B, D) what a step gives to the state before it without the products, which are
// added here; weights: (G * D, D). Beyond a length cell.skip_back(b, t, channels).
template <class T, class Cell>
void run_back(const Sequences& n, const Panels<T>& weights, const T* d_gates, T* d_state, const Cell& cell) {
    in_shares(n, weights, [&](Range sequences, Range panels, const auto& wait) {
        const Range mine{panels.begin * PANEL<T>, std::min(n.width, panels.end * PANEL<T>)};
        for (long t = n.steps - 1; t >= 0; --t) {
            for (long b = sequences.begin; b < sequences.end; ++b) {
                if (n.runs(b, t)) cell.pull(b, t, mine);
                else cell.skip_back(b, t, mine);
            }
            wait();
            const long gates = weights.depth;
            const Left<T> gradients{d_gates + (sequences.begin * n.steps + t) * gates, n.steps * gates, 1};
            for (long p = panels.begin; p < panels.end; ++p) {
                const long first = p * PANEL<T>, there = std::min(n.width - first, PANEL<T>);
                const auto emit = [&](long m, const T* product) {
                    const long b = sequences.begin + m;
                    if (!n.runs(b, t)) return;
                    T* to = d_state + b * n.width + first;
                    for (long j = 0; j < there; ++j) to[j] += product[j];
                };
                rows_times_panel(gradients, sequences.end - sequences.begin, weights.panel(p), gates, emit);
            }
        }
    });
}

}  // namespace srm
