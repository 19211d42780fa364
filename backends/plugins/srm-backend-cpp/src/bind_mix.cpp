#include "bind.hpp"
#include "mix.hpp"

namespace srm {
namespace {

using Flags = In<bool>;

template <class T>
MixHeads<T> heads_of(
    const In<T>& x, const In<T>& weight, const In<T>& bias, const In<T>& decay, const Flags& is_row,
    const Integers& starts, const Integers& lengths) {
    const long heads = extent(x, 2), width = extent(x, 3);
    const Sequences n{extent(x, 0), extent(x, 1), heads * width, data_of(lengths)};
    return {weight.data(), bias.data(), decay.data(), is_row.data(), starts.data(), n, heads, width, extent(weight, 1)};
}

template <class T>
void forward(
    const In<T>& x, const In<T>& weight, const In<T>& bias, const In<T>& decay, const Flags& is_row,
    const Integers& starts, const Integers& lengths, const Out<T>& state, const Out<T>& y, const Out<T>& states) {
    const nb::gil_scoped_release released;
    mix(heads_of(x, weight, bias, decay, is_row, starts, lengths), x.data(), state.data(), y.data(), data_of(states));
}

template <class T>
void backward(
    const In<T>& x, const In<T>& weight, const In<T>& bias, const In<T>& decay, const Flags& is_row,
    const Integers& starts, const Integers& lengths, const In<T>& initial, const In<T>& states, const In<T>& d_y,
    const Out<T>& d_state, const Out<T>& a, const Out<T>& d_x, const Out<T>& d_weight, const Out<T>& d_bias,
    const Out<T>& d_decay) {
    const nb::gil_scoped_release released;
    const auto of = heads_of(x, weight, bias, decay, is_row, starts, lengths);
    mix_states_backward(of, d_y.data(), d_state.data(), a.data(), d_x.data());
    mix_parameters_backward(
        of, x.data(), initial.data(), states.data(), d_y.data(), a.data(),
        MixGradients<T>{d_weight.data(), d_bias.data(), d_decay.data()});
}

template <class T> void bind(nb::module_& m) {
    m.def("mix", &forward<T>, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "decay"_a.noconvert(),
          "is_row"_a, "starts"_a, "lengths"_a.none(), "state"_a.noconvert(), "y"_a.noconvert(),
          "states"_a.noconvert().none());
    m.def("mix_backward", &backward<T>, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(),
          "decay"_a.noconvert(), "is_row"_a, "starts"_a, "lengths"_a.none(), "initial"_a.noconvert(),
          "states"_a.noconvert(), "d_y"_a.noconvert(), "d_state"_a.noconvert(), "a"_a.noconvert(),
          "d_x"_a.noconvert(), "d_weight"_a.noconvert(), "d_bias"_a.noconvert(), "d_decay"_a.noconvert());
}

}  // namespace

void bind_mix(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace srm
