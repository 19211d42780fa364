#include "bind.hpp"
#include "scan.hpp"
#include "sums.hpp"

namespace srm {
namespace {

// An extent of 1 along T stands for all steps, and one along B or D likewise.
template <class T> Rows<T> rows_of(const Strided<T>& a) {
    if (!a.is_valid()) return {};
    const auto stride = [&](int axis) { return a.shape(axis) == 1 ? 0 : static_cast<long>(a.stride(axis)); };
    return {a.data(), stride(0), stride(1), stride(2)};
}

// Their last axis is dense (`arrays.py`).
template <class T> Rows<T> dense_rows_of(const Strided<T>& a) {
    Rows<T> rows = rows_of(a);
    rows.channel = 1;
    return rows;
}

template <class T> Sequences sequences_of(const Out<T>& y, const Integers& lengths) {
    return {extent(y, 0), extent(y, 1), extent(y, 2), data_of(lengths)};
}

template <class T>
void forward(
    const Strided<T>& gates, const Strided<T>& tokens, const Integers& lengths, bool reverse, const Out<T>& state,
    const Out<T>& y) {
    const nb::gil_scoped_release released;
    const Sequences n = sequences_of(y, lengths);
    scan({n, reverse}, rows_of(gates), dense_rows_of(tokens), state.data(), y.data());
}

template <class T>
void backward(
    const Strided<T>& gates, const In<T>& start, const In<T>& y, const Strided<T>& d_y, const Integers& lengths,
    bool reverse, const Out<T>& d_state, const Out<T>& d_gates, const Out<T>& d_tokens) {
    const nb::gil_scoped_release released;
    const Sequences n = sequences_of(d_tokens, lengths);
    scan_backward(
        {n, reverse}, rows_of(gates), start.data(), y.data(), dense_rows_of(d_y), d_state.data(), d_gates.data(),
        d_tokens.data());
}

template <class T> void sums(const In<T>& values, const Out<T>& of_rows, const Out<T>& of_channels) {
    const nb::gil_scoped_release released;
    const long rows = extent(values, 0), width = extent(values, 1);
    if (of_rows.is_valid()) sum_rows(values.data(), rows, width, width, of_rows.data());
    if (of_channels.is_valid()) sum_channels(values.data(), rows, width, of_channels.data());
}

template <class T> void bind(nb::module_& m) {
    m.def("scan", &forward<T>, "gates"_a.noconvert(), "tokens"_a.noconvert().none(), "lengths"_a.none(), "reverse"_a,
          "state"_a.noconvert(), "y"_a.noconvert());
    m.def("scan_backward", &backward<T>, "gates"_a.noconvert(), "start"_a.noconvert(), "y"_a.noconvert(),
          "d_y"_a.noconvert(), "lengths"_a.none(), "reverse"_a, "d_state"_a.noconvert(),
          "d_gates"_a.noconvert(), "d_tokens"_a.noconvert());
    m.def("sums", &sums<T>, "values"_a.noconvert(), "of_rows"_a.noconvert().none(),
          "of_channels"_a.noconvert().none());
}

}  // namespace

void bind_scan(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace srm
