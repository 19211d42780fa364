// mdi, element by element: g = sigmoid(gate), gamma = clamp(sigmoid(decay) * sigmoid(modulation), eps, 1 - eps),
// h_new = (1 - g) * h + g * z + gamma * h.
#pragma once

#include "maths.hpp"
#include "threads.hpp"

namespace srm {

constexpr double EXPONENTIAL = 10;  // what one costs, in multiplications

template <class T> struct MdiInputs {
    const T *z, *h, *gate, *decay, *modulation;  // modulation may be null: 1
    T low, high;                                 // of gamma
};

template <class T> struct MdiGradients {
    T *z, *h, *gate, *decay, *modulation;
};

template <class F> void for_parts(long size, const F& f) {
    const int threads = threads_for(3 * EXPONENTIAL * static_cast<double>(size));
    team(threads, [&](int me, int all) { f(part(size, me, all, 64)); });
}

template <class T, bool MODULATED> struct Gamma {
    T d, m, product, value;
    Gamma(const MdiInputs<T>& in, long i)
        : d(sigmoid(in.decay[i])), m(MODULATED ? sigmoid(in.modulation[i]) : T(1)), product(d * m) {
        value = product < in.low ? in.low : product;
        value = value > in.high ? in.high : value;
    }
};

template <bool MODULATED, class T> void mdi(const MdiInputs<T>& in, long size, T* h_new, T* gamma) {
    for_parts(size, [=](Range mine) {
#pragma omp simd
        for (long i = mine.begin; i < mine.end; ++i) {
            const T g = sigmoid(in.gate[i]), kept = Gamma<T, MODULATED>(in, i).value, h = in.h[i];
            h_new[i] = (1 - g) * h + g * in.z[i] + kept * h;
            gamma[i] = kept;
        }
    });
}

// With a the gradient of h_new, and e that of gamma: e = dgamma + a * h where gamma is not clamped, else 0.
template <bool MODULATED, class T>
void mdi_backward(const MdiInputs<T>& in, long size, const T* d_h_new, const T* d_gamma, const MdiGradients<T>& out) {
    for_parts(size, [=](Range mine) {
#pragma omp simd
        for (long i = mine.begin; i < mine.end; ++i) {
            const T a = d_h_new[i], h = in.h[i], z = in.z[i], g = sigmoid(in.gate[i]);
            const Gamma<T, MODULATED> gamma(in, i);
            const bool clamped = gamma.product < in.low || gamma.product > in.high;
            const T e = clamped ? T(0) : (d_gamma[i] + a * h) * gamma.product;
            out.z[i] = a * g;
            out.h[i] = a * (1 - g + gamma.value);
            out.gate[i] = a * (z - h) * g * (1 - g);
            out.decay[i] = e * (1 - gamma.d);
            if (MODULATED) out.modulation[i] = e * (1 - gamma.m);
        }
    });
}

}  // namespace srm
