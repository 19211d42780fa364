// Attention of query (B, H, T, D) to k (Bk, H, S, D) and v (Bv, H, S, E), Bk and Bv being B or 1:
// out = p @ v with p[s] = exp(scale * q . k[s]) / sum. A row without slots, or with scores of -inf alone, gives 0.
// Rows are taken a few at a time, all of whose scores are in the cache at once.
// Backwards: dv = p^T @ dout, ds = p * (dout @ v^T - sum of p * (dout @ v^T)), dq = scale * ds @ k,
// dk = scale * ds^T @ q. The probabilities are computed again.
#pragma once

#include <limits>
#include <memory>
#include <vector>

#include "maths.hpp"
#include "product.hpp"

namespace srm {

constexpr long SCORES = 1 << 16, MOST_ROWS = 64;

template <class T> struct Attention {
    long batch, heads, steps, slots, width, out_width, key_batch, value_batch;
    const T *query, *keys, *values;
    T scale;

    double work() const {
        return static_cast<double>(batch * heads * steps) * static_cast<double>(slots * (width + out_width));
    }
    long rows_together() const { return std::clamp<long>(SCORES / std::max(1L, slots), 4, MOST_ROWS); }
    const T* key(long b, long h) const { return keys + ((key_batch == 1 ? 0 : b) * heads + h) * slots * width; }
    const T* value(long b, long h) const {
        return values + ((value_batch == 1 ? 0 : b) * heads + h) * slots * out_width;
    }
};

// Rows as the right side of a product, `depth` of them as they are, or transposed.
template <class T> void pack_rows(Panels<T>& panels, const T* rows, long depth) {
    panels.depth = depth;
    panels.pack([&](long k, long n) { return rows[k * panels.width + n]; });
}
template <class T> void pack_columns(Panels<T>& panels, const T* rows) {
    panels.pack([&](long k, long n) { return rows[n * panels.depth + k]; });
}

// Scores of a row in place to probabilities; false if there is nothing to attend to.
template <class T> bool softmax(T* row, long slots, T scale) {
    constexpr T nothing = -std::numeric_limits<T>::infinity();
    T peak = nothing, total = 0;
#pragma omp simd reduction(max : peak)
    for (long s = 0; s < slots; ++s) {
        row[s] *= scale;
        peak = row[s] > peak ? row[s] : peak;  // leaves out NaN, which comes back in the total
    }
    const T shift = peak == nothing ? T(0) : peak;
#pragma omp simd reduction(+ : total)
    for (long s = 0; s < slots; ++s) {
        row[s] = exponential(row[s] - shift);
        total += row[s];
    }
    const bool some = total != 0;
    for (long s = 0; s < slots && some; ++s) row[s] /= total;
    return some;
}

// What one thread works with: k and v of a head, packed, and the probabilities of a few rows.
template <class T> struct AttentionSpace {
    Panels<T> k_columns, v_rows;
    Buffer<T> p;
    bool attends[MOST_ROWS];
    const T *key = nullptr, *value = nullptr;  // those that are packed

    explicit AttentionSpace(const Attention<T>& a)
        : k_columns(a.width, a.slots), v_rows(a.slots, a.out_width), p(a.rows_together() * a.slots) {}

    void pack(const Attention<T>& a, long b, long h) {
        if (a.key(b, h) != key) pack_columns(k_columns, key = a.key(b, h));
        if (a.value(b, h) != value) pack_rows(v_rows, value = a.value(b, h), a.slots);
    }
    void probabilities(const Attention<T>& a, const T* q, long rows) {
        matrix_product(Left<T>{q, a.width, 1}, rows, k_columns, p.get(), a.slots, false, 1);
        for (long r = 0; r < rows; ++r) attends[r] = softmax(p.get() + r * a.slots, a.slots, a.scale);
    }
};

// f(b, h, steps, space) for each head, or part of its steps where there are fewer heads than threads. A head's
// sequences follow each other, since they may share its memory. Spaces are taken before the threads start.
template <class Space, class T, class F> void for_each_head(const Attention<T>& a, long most_cuts, const F& f) {
    const long heads = a.batch * a.heads, wanted = threads_for(a.work());
    const long cuts = cuts_for(static_cast<int>(wanted), heads, std::max(1L, most_cuts)), tasks = heads * cuts;
    const int threads = static_cast<int>(std::min(wanted, std::max(1L, tasks)));
    std::vector<std::unique_ptr<Space>> spaces;
    for (int i = 0; i < threads; ++i) spaces.push_back(std::make_unique<Space>(a));
    team(threads, [&](int me, int all) {
        const Range mine = part(tasks, me, all);
        for (long i = mine.begin; i < mine.end; ++i) {
            const long b = i / cuts % a.batch, h = i / cuts / a.batch;
            f(b, h, part(a.steps, i % cuts, cuts, a.rows_together()), *spaces[me]);
        }
    });
}

template <class T> void attend(const Attention<T>& a, T* out) {
    const long together = a.rows_together();
    const auto head = [&](long b, long h, Range steps, AttentionSpace<T>& space) {
        space.pack(a, b, h);
        for (long t = steps.begin; t < steps.end; t += together) {
            const long rows = std::min(together, steps.end - t), first = (b * a.heads + h) * a.steps + t;
            T* to = out + first * a.out_width;
            space.probabilities(a, a.query + first * a.width, rows);
            matrix_product(Left<T>{space.p.get(), a.slots, 1}, rows, space.v_rows, to, a.out_width, false, 1);
            for (long r = 0; r < rows; ++r)
                if (!space.attends[r]) std::fill(to + r * a.out_width, to + (r + 1) * a.out_width, T(0));
        }
    };
    for_each_head<AttentionSpace<T>>(a, (a.steps + together - 1) / together, head);
}

template <class T> struct AttentionBackSpace : AttentionSpace<T> {
    Panels<T> v_columns, k_rows, q_rows, d_out_rows;
    Buffer<T> d_s;

    explicit AttentionBackSpace(const Attention<T>& a)
        : AttentionSpace<T>(a), v_columns(a.out_width, a.slots), k_rows(a.slots, a.width),
          q_rows(a.rows_together(), a.width), d_out_rows(a.rows_together(), a.out_width),
          d_s(a.rows_together() * a.slots) {}
};

// ds of a row, times the scale, from dp = dout @ v^T in its place.
template <class T> void softmax_backward(const T* p, long slots, bool attends, T scale, T* d_s) {
    T delta = 0;
#pragma omp simd reduction(+ : delta)
    for (long s = 0; s < slots; ++s) delta += p[s] * d_s[s];
#pragma omp simd
    for (long s = 0; s < slots; ++s) d_s[s] = attends ? scale * (p[s] * (d_s[s] - delta)) : T(0);
}

// d_keys (B, H, S, D) and d_values (B, H, S, E): of each sequence, also where they share a memory.
template <class T>
void attend_backward(const Attention<T>& a, const T* d_out, T* d_query, T* d_keys, T* d_values) {
    const long together = a.rows_together(), D = a.width, E = a.out_width, S = a.slots;
    for_each_head<AttentionBackSpace<T>>(a, 1, [&](long b, long h, Range steps, AttentionBackSpace<T>& space) {
        const long head = b * a.heads + h;
        T *d_k = d_keys + head * S * D, *d_v = d_values + head * S * E, *p = space.p.get(), *d_s = space.d_s.get();
        std::fill(d_k, d_k + S * D, T(0));
        std::fill(d_v, d_v + S * E, T(0));
        space.pack(a, b, h);
        pack_columns(space.v_columns, a.value(b, h));
        pack_rows(space.k_rows, a.key(b, h), S);
        for (long t = steps.begin; t < steps.end; t += together) {
            const long rows = std::min(together, steps.end - t), first = head * a.steps + t;
            const T *q = a.query + first * D, *grad = d_out + first * E;
            space.probabilities(a, q, rows);
            matrix_product(Left<T>{grad, E, 1}, rows, space.v_columns, d_s, S, false, 1);
            for (long r = 0; r < rows; ++r)
                softmax_backward(p + r * S, S, space.attends[r], a.scale, d_s + r * S);
            matrix_product(Left<T>{d_s, S, 1}, rows, space.k_rows, d_query + first * D, D, false, 1);
            pack_rows(space.q_rows, q, rows);
            matrix_product(Left<T>{d_s, 1, S}, S, space.q_rows, d_k, D, true, 1);
            pack_rows(space.d_out_rows, grad, rows);
            matrix_product(Left<T>{p, 1, S}, S, space.d_out_rows, d_v, E, true, 1);
        }
    });
}

}  // namespace srm
