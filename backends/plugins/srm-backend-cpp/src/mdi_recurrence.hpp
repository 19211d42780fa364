// mdi_recurrence: g = sigmoid([z, h] @ w_mdi^T + b_mdi), n = (1 - g) * h + g * z + gamma * h,
// h <- z * u + gamma * h + mix * n with u = sigmoid(h @ w_gate^T + b_gate).
// gates (B, T, 2D) holds u and g; until a step comes, z's part of the product in the place of g.
#pragma once

#include "gated.hpp"
#include "maths.hpp"
#include "projection.hpp"
#include "sums.hpp"

namespace srm {

template <class T> struct MdiWeights {
    const T *w_gate, *b_gate, *w_mdi, *b_mdi;  // (D, D), (D,), (D, 2D), (D,)
};

template <class T> struct MdiStep {
    static constexpr int GATES = 2;

    const Sequences& n;
    const MdiWeights<T>& weights;
    const T *z, *gamma, *initial;
    T mix, *gates, *states;

    void advance(long b, long t, Range channels, const T* product) const {
        const long here = n.row(b, t) + channels.begin, count = channels.end - channels.begin;
        const T *z_t = z + here, *gamma_t = gamma + here, *h = n.before(initial, states, b, t) + channels.begin;
        const T *b_gate = weights.b_gate + channels.begin, *b_mdi = weights.b_mdi + channels.begin;
        const T* of_g = product + PANEL<T> / GATES;
        T *next = states + here, *u_t = gates + 2 * n.row(b, t) + channels.begin, *g_t = u_t + n.width;
#pragma omp simd
        for (long i = 0; i < count; ++i) {
            const T u = sigmoid(product[i] + b_gate[i]), g = sigmoid(of_g[i] + (g_t[i] + b_mdi[i]));
            const T kept = gamma_t[i] * h[i], integrated = (1 - g) * h[i] + g * z_t[i] + kept;
            next[i] = z_t[i] * u + kept + mix * integrated;
            u_t[i] = u;
            g_t[i] = g;
        }
    }
    void skip(long b, long t, Range channels) const {
        std::fill(states + n.row(b, t) + channels.begin, states + n.row(b, t) + channels.end, T(0));
    }
};

// With e the gradient of the new h: dn = mix * e, du = e * z * u * (1 - u), dg = dn * (z - h) * g * (1 - g) before the
// sigmoids; dz = e * u + dn * g, dgamma = (e + dn) * h, dh = e * gamma + dn * (1 - g + gamma), and the products.
template <class T> struct MdiStepBack {
    const Sequences& n;
    const T *z, *gamma, *initial, *gates, *states, *d_out;
    T mix, *d_state, *d_gates, *d_z, *d_gamma;

    void pull(long b, long t, Range channels) const {
        const long here = n.row(b, t);
        const T *z_t = z + here, *gamma_t = gamma + here, *h = n.before(initial, states, b, t), *d_out_t = d_out + here;
        const T *u_t = gates + 2 * here, *g_t = u_t + n.width;
        T *d_h = d_state + b * n.width, *d_u = d_gates + 2 * here, *d_g = d_u + n.width;
        T *d_z_t = d_z + here, *d_gamma_t = d_gamma + here;
#pragma omp simd
        for (long c = channels.begin; c < channels.end; ++c) {
            const T e = d_h[c] + d_out_t[c], d_n = mix * e, u = u_t[c], g = g_t[c];
            d_u[c] = e * z_t[c] * u * (1 - u);
            d_g[c] = d_n * (z_t[c] - h[c]) * g * (1 - g);
            d_z_t[c] = e * u + d_n * g;
            d_gamma_t[c] = (e + d_n) * h[c];
            d_h[c] = e * gamma_t[c] + d_n * (1 - g + gamma_t[c]);
        }
    }
    void skip_back(long b, long t, Range channels) const {
        if (channels.begin >= channels.end) return;
        const long here = n.row(b, t);
        for (T* row : {d_gates + 2 * here, d_gates + 2 * here + n.width, d_z + here, d_gamma + here})
            std::fill(row + channels.begin, row + channels.end, T(0));
    }
};

// w_gate over w_mdi's second half, (2D, D): what multiplies the state.
template <class T> struct StateWeights {
    const MdiWeights<T>& of;
    long width;

    T operator()(long row, long k) const {
        return row < width ? of.w_gate[row * width + k] : of.w_mdi[(row - width) * 2 * width + width + k];
    }
};

template <class T>
void mdi_recurrence(
    const Sequences& n, const MdiWeights<T>& w, const T* z, const T* gamma, const T* initial, T mix, T* gates,
    T* states, T* last) {
    const long D = n.width;
    project(n, z, D, transposed_panels(w.w_mdi, D, D, 2 * D), gates + D, 2 * D, false);
    const auto weights = gate_panels<T, 2>(D, StateWeights<T>{w, D});
    run(n, weights, initial, states, MdiStep<T>{n, w, z, gamma, initial, mix, gates, states});
    last_states(n, initial, states, last);
}

template <class T> struct MdiWeightGradients {
    T *w_gate, *b_gate, *w_mdi, *b_mdi;
};

// d_state (B, D): the gradient of the last state, and in the end of the initial one.
template <class T>
void mdi_recurrence_backward(
    const MdiStepBack<T>& step, const MdiWeights<T>& w, const MdiWeightGradients<T>& out) {
    const Sequences& n = step.n;
    const long D = n.width, rows = n.batch * n.steps;
    Panels<T> back(2 * D, D);
    back.pack([of = StateWeights<T>{w, D}](long k, long column) { return of(k, column); });
    run_back(n, back, step.d_gates, step.d_state, step);
    const T *d_u = step.d_gates, *d_g = d_u + D;
    project(n, d_g, 2 * D, plain_panels(w.w_mdi, D, D, 2 * D), step.d_z, D, true);
    for (long b = 0; b < n.batch; ++b) clear_beyond(n, b, D, {0, D}, step.d_z);  // 0 times an infinite weight
    const auto z = panels_of_steps<T>(n, D, [&](long b, long t) { return step.z + n.row(b, t); });
    weights_backward(d_g, D, 2 * D, z, out.w_mdi, 2 * D);
    const auto h =
        panels_of_steps<T>(n, D, [&](long b, long t) { return n.before(step.initial, step.states, b, t); });
    weights_backward(d_g, D, 2 * D, h, out.w_mdi + D, 2 * D);
    weights_backward(d_u, D, 2 * D, h, out.w_gate, D);
    sum_rows(d_u, rows, D, 2 * D, out.b_gate);
    sum_rows(d_g, rows, D, 2 * D, out.b_mdi);
}

}  // namespace srm
