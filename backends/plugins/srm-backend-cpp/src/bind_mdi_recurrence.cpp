#include "bind.hpp"
#include "mdi_recurrence.hpp"

namespace srm {
namespace {

template <class T> Sequences sequences_of(const In<T>& z, const Integers& lengths) {
    return {extent(z, 0), extent(z, 1), extent(z, 2), data_of(lengths)};
}

template <class T>
void forward(
    const In<T>& z, const In<T>& gamma, const In<T>& h0, const In<T>& w_gate, const In<T>& b_gate, const In<T>& w_mdi,
    const In<T>& b_mdi, double mix, const Integers& lengths, const Out<T>& gates, const Out<T>& states,
    const Out<T>& last) {
    const nb::gil_scoped_release released;
    mdi_recurrence<T>(
        sequences_of<T>(z, lengths), {w_gate.data(), b_gate.data(), w_mdi.data(), b_mdi.data()}, z.data(),
        gamma.data(), h0.data(), static_cast<T>(mix), gates.data(), states.data(), last.data());
}

template <class T>
void backward(
    const In<T>& z, const In<T>& gamma, const In<T>& h0, const In<T>& w_gate, const In<T>& b_gate, const In<T>& w_mdi,
    const In<T>& b_mdi, double mix, const Integers& lengths, const In<T>& gates, const In<T>& states,
    const In<T>& d_out, const Out<T>& d_gates, const Out<T>& d_z, const Out<T>& d_gamma, const Out<T>& d_state,
    const Out<T>& d_w_gate, const Out<T>& d_b_gate, const Out<T>& d_w_mdi, const Out<T>& d_b_mdi) {
    const nb::gil_scoped_release released;
    const Sequences n = sequences_of<T>(z, lengths);
    mdi_recurrence_backward<T>(
        {n, z.data(), gamma.data(), h0.data(), gates.data(), states.data(), d_out.data(), static_cast<T>(mix),
         d_state.data(), d_gates.data(), d_z.data(), d_gamma.data()},
        {w_gate.data(), b_gate.data(), w_mdi.data(), b_mdi.data()},
        {d_w_gate.data(), d_b_gate.data(), d_w_mdi.data(), d_b_mdi.data()});
}

template <class T> void bind(nb::module_& m) {
    m.def("mdi_recurrence", &forward<T>, "z"_a.noconvert(), "gamma"_a.noconvert(), "h0"_a.noconvert(),
          "w_gate"_a.noconvert(), "b_gate"_a.noconvert(), "w_mdi"_a.noconvert(), "b_mdi"_a.noconvert(), "mix"_a,
          "lengths"_a.none(), "gates"_a.noconvert(), "states"_a.noconvert(), "last"_a.noconvert());
    m.def("mdi_recurrence_backward", &backward<T>, "z"_a.noconvert(), "gamma"_a.noconvert(), "h0"_a.noconvert(),
          "w_gate"_a.noconvert(), "b_gate"_a.noconvert(), "w_mdi"_a.noconvert(), "b_mdi"_a.noconvert(), "mix"_a,
          "lengths"_a.none(), "gates"_a.noconvert(), "states"_a.noconvert(), "d_out"_a.noconvert(),
          "d_gates"_a.noconvert(), "d_z"_a.noconvert(), "d_gamma"_a.noconvert(), "d_state"_a.noconvert(),
          "d_w_gate"_a.noconvert(), "d_b_gate"_a.noconvert(), "d_w_mdi"_a.noconvert(), "d_b_mdi"_a.noconvert());
}

}  // namespace

void bind_mdi_recurrence(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace srm
