// Sums of gradients, in float64 and in one order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "threads.hpp"

namespace srm {

// A sum and what its additions have lost (D. Knuth's two-sum): gradients that cancel keep their digits.
struct Total {
    double sum = 0, lost = 0;

    void add(double value) {
        const double next = sum + value, part = next - sum;
        lost += (sum - (next - part)) + (value - part);
        sum = next;
    }
    void add(const Total& other) {
        add(other.sum);
        lost += other.lost;
    }
    // Beyond the range what was lost is not a number.
    double value() const { return std::isfinite(sum) ? sum + lost : sum; }
};

// The sum of value(c) for c = 0 ... n-1.
template <class F> inline Total sum_of(long n, const F& value) {
    constexpr int PARTS = 16;
    Total parts[PARTS], all;
    long c = 0;
    for (; c + PARTS <= n; c += PARTS) {
#pragma omp simd
        for (int j = 0; j < PARTS; ++j) parts[j].add(value(c + j));
    }
    for (int j = 0; c + j < n; ++j) parts[j].add(value(c + j));
    for (const Total& part : parts) all.add(part);
    return all;
}

// sums[c] over all rows of (rows, D), rows `stride` apart: of a gate that is constant in time, or a bias.
template <class T> void sum_rows(const T* values, long rows, long width, long stride, T* sums) {
    for_each((width + 63) / 64, threads_for(static_cast<double>(rows * width * sizeof(T))), [&](long block) {
        const long first = block * 64, n = std::min<long>(64, width - first);
        Total total[64];
        for (long r = 0; r < rows; ++r) {
#pragma omp simd
            for (long c = 0; c < n; ++c) total[c].add(static_cast<double>(values[r * stride + first + c]));
        }
        for (long c = 0; c < n; ++c) sums[first + c] = static_cast<T>(total[c].value());
    });
}

// sums[r] over the channels of (rows, D): of a gate that all of them share.
template <class T> void sum_channels(const T* values, long rows, long width, T* sums) {
    for_each(rows, threads_for(static_cast<double>(rows * width * sizeof(T))), [&](long r) {
        const T* row = values + r * width;
        sums[r] = static_cast<T>(sum_of(width, [row](long c) { return static_cast<double>(row[c]); }).value());
    });
}

}  // namespace srm
