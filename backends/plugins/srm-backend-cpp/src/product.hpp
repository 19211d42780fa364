// Matrix products a @ b with b packed beforehand: its columns in panels of four vectors, which are multiplied by a few
// rows of a at once. A sum goes through k in one order, however the work is cut, so results depend on no thread count.
#pragma once

#include <algorithm>

#include "buffer.hpp"
#include "threads.hpp"
#include "vec.hpp"

namespace srm {

template <class T> constexpr long PANEL = 4 * LANES<T>;  // columns
constexpr int ROWS = VECTOR_BYTES == 64 ? 4 : 2;         // with 4 vectors each they fill the registers
constexpr long DEPTH = 256, BLOCK_ROWS = 64;             // of a part that stays in the cache
constexpr long PART = 32;                                // products in a sum

// b (K, N) in panels; columns that are missing in the last one are 0.
template <class T> struct Panels {
    long depth, width, count;
    Buffer<T> data;

    Panels(long depth, long width)
        : depth(depth), width(width), count((width + PANEL<T> - 1) / PANEL<T>), data(count * depth * PANEL<T>) {}

    T* panel(long p) const { return data.get() + p * depth * PANEL<T>; }

    // element(k, n) is b's.
    template <class F> void pack(const F& element) {
        for (long p = 0; p < count; ++p) pack_panel(p, element);
    }
    template <class F> void pack_panel(long p, const F& element) {
        const long first = p * PANEL<T>, there = std::min(width - first, PANEL<T>);
        for (long k = 0; k < depth; ++k) {
            T* row = panel(p) + k * PANEL<T>;
            for (long j = 0; j < there; ++j) row[j] = element(k, first + j);
            std::fill(row + there, row + PANEL<T>, T(0));
        }
    }
};

// a's element of row m at k is data[m * row + k * column].
template <class T> struct Left {
    const T* data;
    long row, column;
};

// out (M, PANEL) += M rows of a @ one panel, from k = begin on: CHAINS parts of `count` products each, side by side.
template <int M, int CHAINS, class T>
inline void add_parts(Left<T> a, const T* panel, long begin, long count, T* out) {
    Vec<T> sum[CHAINS][M][4] = {};
    for (long i = 0; i < count; ++i) {
#pragma GCC unroll 2
        for (int chain = 0; chain < CHAINS; ++chain) {
            const long k = begin + chain * count + i;
            Vec<T> b[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) b[j] = load<Vec<T>>(panel + k * PANEL<T> + j * LANES<T>);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const Vec<T> x = splat<Vec<T>>(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sum[chain][m][j] += x * b[j];
            }
        }
    }
    for (int chain = 0; chain < CHAINS; ++chain)
        for (int m = 0; m < M; ++m)
            for (int j = 0; j < 4; ++j) {
                T* to = out + m * PANEL<T> + j * LANES<T>;
                store(to, load<Vec<T>>(to) + sum[chain][m][j]);
            }
}

// out (M, PANEL) = M rows of a @ one panel. Each number is the sum of the sums of PART products, which loses less than
// one long sum. Of a single row two parts are summed at a time, because one addition waits for the other.
template <int M, class T> inline void multiply(Left<T> a, const T* panel, long depth, T* out) {
    std::fill(out, out + M * PANEL<T>, T(0));
    long k = 0;
    if constexpr (M == 1)
        for (; k + 2 * PART <= depth; k += 2 * PART) add_parts<1, 2>(a, panel, k, PART, out);
    for (; k < depth; k += PART) add_parts<M, 1>(a, panel, k, std::min(PART, depth - k), out);
}

// emit(m, values): each of `rows` rows of a @ one panel (or a part of its depth), PANEL numbers.
template <class T, class Emit>
inline void rows_times_panel(Left<T> a, long rows, const T* panel, long depth, const Emit& emit) {
    alignas(64) T out[ROWS * PANEL<T>];
    for (long m = 0; m < rows;) {
        const Left<T> here{a.data + m * a.row, a.row, a.column};
        const long left = rows - m, n = left >= ROWS ? ROWS : left >= 2 ? 2 : 1;
        if (n == ROWS) multiply<ROWS>(here, panel, depth, out);
        else if (n == 2) multiply<2>(here, panel, depth, out);
        else multiply<1>(here, panel, depth, out);
        for (long i = 0; i < n; ++i) emit(m + i, out + i * PANEL<T>);
        m += n;
    }
}

// c (M, N), rows `stride` apart, = a @ b, or c + a @ b.
template <class T>
void matrix_product(Left<T> a, long rows, const Panels<T>& b, T* c, long stride, bool adds, int threads) {
    for_each((rows + BLOCK_ROWS - 1) / BLOCK_ROWS, threads, [&](long block) {
        const long first = block * BLOCK_ROWS, n = std::min(BLOCK_ROWS, rows - first);
        for (long k = 0; k == 0 || k < b.depth; k += DEPTH) {
            const Left<T> part{a.data + first * a.row + k * a.column, a.row, a.column};
            for (long p = 0; p < b.count; ++p) {
                const long columns = std::min(b.width - p * PANEL<T>, PANEL<T>);
                T* to = c + first * stride + p * PANEL<T>;
                const auto emit = [&](long m, const T* values) {
                    T* row = to + m * stride;
                    if (!adds && k == 0) std::copy(values, values + columns, row);
                    else for (long j = 0; j < columns; ++j) row[j] += values[j];
                };
                rows_times_panel(part, n, b.panel(p) + k * PANEL<T>, std::min(DEPTH, b.depth - k), emit);
            }
        }
    });
}

}  // namespace srm
