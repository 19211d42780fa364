// Products of weights with all steps at once, which wait for no state, and the gradients of weights.
#pragma once

#include "product.hpp"
#include "sequences.hpp"

namespace srm {

// weights (N, K), row-major and rows `stride` apart, as what multiplies from the right: x @ weights^T, or x @ weights.
template <class T> Panels<T> transposed_panels(const T* weights, long rows, long depth, long stride) {
    Panels<T> panels(depth, rows);
    panels.pack([=](long k, long n) { return weights[n * stride + k]; });
    return panels;
}

template <class T> Panels<T> plain_panels(const T* weights, long depth, long columns, long stride) {
    Panels<T> panels(depth, columns);
    panels.pack([=](long k, long n) { return weights[k * stride + n]; });
    return panels;
}

// What was multiplied by weights at each step, (B * T, columns), as a product of gradients wants it. row(b, t) points
// to a step's values; beyond a length they are 0.
template <class T, class Row> Panels<T> panels_of_steps(const Sequences& n, long columns, const Row& row) {
    Panels<T> values(n.batch * n.steps, columns);
    for_each(values.count, threads_for(static_cast<double>(values.depth * columns)), [&](long p) {
        values.pack_panel(p, [&](long k, long c) {
            const long b = k / n.steps, t = k % n.steps;
            return n.runs(b, t) ? row(b, t)[c] : T(0);
        });
    });
    return values;
}

// The gradient of weights (G, columns), rows `stride` apart: d_gates^T @ values. d_gates (B * T, G), rows `apart`.
template <class T>
void weights_backward(const T* d_gates, long gates, long apart, const Panels<T>& values, T* d_weights, long stride) {
    const double work = static_cast<double>(values.depth) * static_cast<double>(values.width * gates);
    matrix_product(Left<T>{d_gates, 1, apart}, gates, values, d_weights, stride, false, threads_for(work));
}

// out (B * T, N), rows `stride` apart, = rows (B * T, K), `apart` from each other, @ weights, or that added.
template <class T>
void project(
    const Sequences& n, const T* rows, long apart, const Panels<T>& weights, T* out, long stride, bool adds) {
    const double work = static_cast<double>(n.batch * n.steps) * static_cast<double>(weights.depth * weights.width);
    matrix_product(Left<T>{rows, apart, 1}, n.batch * n.steps, weights, out, stride, adds, threads_for(work));
}

}  // namespace srm
