#include "bind.hpp"
#include "lstm.hpp"

namespace srm {
namespace {

template <class T> Sequences sequences_of(const In<T>& x, const In<T>& w_hh, const Integers& lengths) {
    return {extent(x, 0), extent(x, 1), extent(w_hh, 1), data_of(lengths)};
}

template <class T> LstmInput<T> input_of(const In<T>& x, const In<T>& w_ih, const In<T>& w_hh) {
    return {x.data(), w_ih.data(), w_hh.data(), extent(x, 2)};
}

template <class T>
void forward(
    const In<T>& x, const In<T>& w_ih, const In<T>& w_hh, const In<T>& bias, const In<T>& h0, const Integers& lengths,
    const Out<T>& gates, const Out<T>& states, const Out<T>& cells, const Out<T>& last, const Out<T>& cell) {
    const nb::gil_scoped_release released;
    const Sequences n = sequences_of(x, w_hh, lengths);
    lstm<T>(
        input_of(x, w_ih, w_hh), h0.data(),
        {n, bias.data(), gates.data(), states.data(), data_of(cells), cell.data()}, last.data());
}

template <class T>
void backward(
    const In<T>& x, const In<T>& w_ih, const In<T>& w_hh, const In<T>& h0, const In<T>& c0, const Integers& lengths,
    const In<T>& gates, const In<T>& states, const In<T>& cells, const In<T>& d_y, const Out<T>& d_gates,
    const Out<T>& d_state, const Out<T>& d_cell, const Out<T>& d_x, const Out<T>& d_w_ih, const Out<T>& d_w_hh,
    const Out<T>& d_bias) {
    const nb::gil_scoped_release released;
    const Sequences n = sequences_of(x, w_hh, lengths);
    lstm_backward<T>(
        input_of(x, w_ih, w_hh),
        {n, h0.data(), c0.data(), gates.data(), states.data(), cells.data(), d_y.data(), d_state.data(),
         d_cell.data(), d_gates.data()},
        {d_x.data(), d_w_ih.data(), d_w_hh.data(), d_bias.data()});
}

template <class T> void bind(nb::module_& m) {
    m.def("lstm", &forward<T>, "x"_a.noconvert(), "w_ih"_a.noconvert(), "w_hh"_a.noconvert(), "bias"_a.noconvert(),
          "h0"_a.noconvert(), "lengths"_a.none(), "gates"_a.noconvert(), "states"_a.noconvert(),
          "cells"_a.noconvert().none(), "last"_a.noconvert(), "cell"_a.noconvert());
    m.def("lstm_backward", &backward<T>, "x"_a.noconvert(), "w_ih"_a.noconvert(), "w_hh"_a.noconvert(),
          "h0"_a.noconvert(), "c0"_a.noconvert(), "lengths"_a.none(), "gates"_a.noconvert(), "states"_a.noconvert(),
          "cells"_a.noconvert(), "d_y"_a.noconvert(), "d_gates"_a.noconvert(), "d_state"_a.noconvert(),
          "d_cell"_a.noconvert(), "d_x"_a.noconvert(), "d_w_ih"_a.noconvert(), "d_w_hh"_a.noconvert(),
          "d_bias"_a.noconvert());
}

}  // namespace

void bind_lstm(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace srm
