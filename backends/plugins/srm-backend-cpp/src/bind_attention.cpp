#include "attention.hpp"
#include "bind.hpp"
#include "pool.hpp"

namespace srm {
namespace {

template <class T>
Attention<T> attention_of(const In<T>& query, const In<T>& keys, const In<T>& values, double scale) {
    return {extent(query, 0), extent(query, 1),  extent(query, 2), extent(keys, 2), extent(query, 3),
            extent(values, 3), extent(keys, 0), extent(values, 0), query.data(),    keys.data(),
            values.data(),     static_cast<T>(scale)};
}

template <class T>
void forward(const In<T>& query, const In<T>& keys, const In<T>& values, double scale, const Out<T>& out) {
    const nb::gil_scoped_release released;
    attend(attention_of(query, keys, values, scale), out.data());
}

template <class T>
void backward(
    const In<T>& query, const In<T>& keys, const In<T>& values, double scale, const In<T>& d_out,
    const Out<T>& d_query, const Out<T>& d_keys, const Out<T>& d_values) {
    const nb::gil_scoped_release released;
    attend_backward(
        attention_of(query, keys, values, scale), d_out.data(), d_query.data(), d_keys.data(), d_values.data());
}

// memory (B, H, M, D), pooled (B, H, windows, D).
template <class T> void pool(const In<T>& memory, int level, long pool, const Out<T>& pooled) {
    const nb::gil_scoped_release released;
    pool_levels(
        memory.data(), extent(memory, 0) * extent(memory, 1), extent(memory, 2), extent(memory, 3), level, pool,
        extent(pooled, 2), pooled.data());
}

template <class T> void spread(const In<T>& d_level, long window, const Out<T>& d_memory) {
    const nb::gil_scoped_release released;
    spread_level(
        d_level.data(), extent(d_memory, 0) * extent(d_memory, 1), extent(d_level, 2), extent(d_memory, 2),
        extent(d_memory, 3), window, d_memory.data());
}

template <class T> void bind(nb::module_& m) {
    m.def("attend", &forward<T>, "query"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(), "scale"_a,
          "out"_a.noconvert());
    m.def("attend_backward", &backward<T>, "query"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
          "scale"_a, "d_out"_a.noconvert(), "d_query"_a.noconvert(), "d_keys"_a.noconvert(),
          "d_values"_a.noconvert());
    m.def("pool", &pool<T>, "memory"_a.noconvert(), "level"_a, "pool"_a, "pooled"_a.noconvert());
    m.def("spread", &spread<T>, "d_level"_a.noconvert(), "window"_a, "d_memory"_a.noconvert());
}

}  // namespace

void bind_attention(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace srm
