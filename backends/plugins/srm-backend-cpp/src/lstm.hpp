// lstm: [i, f, g, o] = x @ w_ih^T + h @ w_hh^T + bias, c <- sigmoid(f) * c + sigmoid(i) * tanh(g),
// h <- sigmoid(o) * tanh(c). gates (B, T, 4H) holds i, f, g, o after their sigmoids and tanh; until a step comes, x's
// part of the product.
#pragma once

#include "gated.hpp"
#include "maths.hpp"
#include "projection.hpp"
#include "sums.hpp"

namespace srm {

template <class T> struct LstmStep {
    static constexpr int GATES = 4;

    const Sequences& n;
    const T* bias;                     // (4H,)
    T *gates, *states, *cells, *cell;  // cells (B, T, H), or null; cell (B, H): the one that runs

    void advance(long b, long t, Range channels, const T* product) const {
        constexpr long apart = PANEL<T> / GATES;
        const long W = n.width, count = channels.end - channels.begin;
        const T* added = bias + channels.begin;
        T *gate = gates + 4 * n.row(b, t) + channels.begin, *c = cell + b * W + channels.begin;
        T* next = states + n.row(b, t) + channels.begin;
#pragma omp simd
        for (long k = 0; k < count; ++k) {
            const T i = sigmoid(product[k] + (gate[k] + added[k]));
            const T f = sigmoid(product[apart + k] + (gate[W + k] + added[W + k]));
            const T g = hyperbolic_tangent(product[2 * apart + k] + (gate[2 * W + k] + added[2 * W + k]));
            const T o = sigmoid(product[3 * apart + k] + (gate[3 * W + k] + added[3 * W + k]));
            c[k] = f * c[k] + i * g;
            next[k] = o * hyperbolic_tangent(c[k]);
            gate[k] = i;
            gate[W + k] = f;
            gate[2 * W + k] = g;
            gate[3 * W + k] = o;
        }
        if (cells) std::copy(c, c + count, cells + n.row(b, t) + channels.begin);
    }
    void skip(long b, long t, Range channels) const {
        std::fill(states + n.row(b, t) + channels.begin, states + n.row(b, t) + channels.end, T(0));
    }
};

// With u = tanh(c): dc += dh * o * (1 - u^2), di = dc * g * i * (1 - i), df = dc * c_before * f * (1 - f),
// dg = dc * i * (1 - g^2), do = dh * u * o * (1 - o), dc_before = dc * f, and dh_before by the products alone.
template <class T> struct LstmStepBack {
    const Sequences& n;
    const T *initial, *initial_cell, *gates, *states, *cells, *d_y;
    T *d_state, *d_cell, *d_gates;

    void pull(long b, long t, Range channels) const {
        const long W = n.width, here = n.row(b, t);
        const T *gate = gates + 4 * here, *c_t = cells + here, *c_before = n.before(initial_cell, cells, b, t);
        const T* d_y_t = d_y + here;
        T *d_h = d_state + b * W, *d_c = d_cell + b * W, *to = d_gates + 4 * here;
#pragma omp simd
        for (long k = channels.begin; k < channels.end; ++k) {
            const T i = gate[k], f = gate[W + k], g = gate[2 * W + k], o = gate[3 * W + k];
            const T u = hyperbolic_tangent(c_t[k]), through_h = d_h[k] + d_y_t[k];
            const T through_c = d_c[k] + through_h * o * (1 - u * u);
            to[k] = through_c * g * i * (1 - i);
            to[W + k] = through_c * c_before[k] * f * (1 - f);
            to[2 * W + k] = through_c * i * (1 - g * g);
            to[3 * W + k] = through_h * u * o * (1 - o);
            d_c[k] = through_c * f;
            d_h[k] = 0;
        }
    }
    void skip_back(long b, long t, Range channels) const {
        for (int gate = 0; gate < 4 && channels.begin < channels.end; ++gate) {
            T* row = d_gates + 4 * n.row(b, t) + gate * n.width;
            std::fill(row + channels.begin, row + channels.end, T(0));
        }
    }
};

template <class T> struct LstmInput {
    const T *x, *w_ih, *w_hh;  // (B, T, I), (4H, I), (4H, H)
    long width;                // I
};

template <class T> void lstm(const LstmInput<T>& in, const T* initial, const LstmStep<T>& step, T* last) {
    const Sequences& n = step.n;
    const long H = n.width;
    project(n, in.x, in.width, transposed_panels(in.w_ih, 4 * H, in.width, in.width), step.gates, 4 * H, false);
    const auto weights = gate_panels<T, 4>(H, [&](long row, long k) { return in.w_hh[row * H + k]; });
    run(n, weights, initial, step.states, step);
    last_states(n, initial, step.states, last);
}

template <class T> struct LstmGradients {
    T *x, *w_ih, *w_hh, *bias;
};

// step.d_state and d_cell (B, H): the gradients of the last state and cell, and in the end of the initial ones.
template <class T>
void lstm_backward(const LstmInput<T>& in, const LstmStepBack<T>& step, const LstmGradients<T>& out) {
    const Sequences& n = step.n;
    const long H = n.width, I = in.width;
    run_back(n, plain_panels(in.w_hh, 4 * H, H, H), step.d_gates, step.d_state, step);
    project(n, step.d_gates, 4 * H, plain_panels(in.w_ih, 4 * H, I, I), out.x, I, false);
    for (long b = 0; b < n.batch; ++b) clear_beyond(n, b, I, {0, I}, out.x);  // 0 times an infinite weight
    const auto x = panels_of_steps<T>(n, I, [&](long b, long t) { return in.x + (b * n.steps + t) * I; });
    weights_backward(step.d_gates, 4 * H, 4 * H, x, out.w_ih, I);
    const auto h =
        panels_of_steps<T>(n, H, [&](long b, long t) { return n.before(step.initial, step.states, b, t); });
    weights_backward(step.d_gates, 4 * H, 4 * H, h, out.w_hh, H);
    sum_rows(step.d_gates, n.batch * n.steps, 4 * H, 4 * H, out.bias);
}

}  // namespace srm
