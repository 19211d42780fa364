#include "bind.hpp"
#include "mdi.hpp"

namespace srm {
namespace {

template <class T>
MdiInputs<T> inputs(
    const In<T>& z, const In<T>& h, const In<T>& gate, const In<T>& decay, const In<T>& modulation, double eps) {
    const T low = static_cast<T>(eps);
    return {z.data(), h.data(), gate.data(), decay.data(), data_of(modulation), low, 1 - low};
}

template <class T>
void forward(
    const In<T>& z, const In<T>& h, const In<T>& gate, const In<T>& decay, const In<T>& modulation, double eps,
    const Out<T>& h_new, const Out<T>& gamma) {
    const nb::gil_scoped_release released;
    const auto in = inputs(z, h, gate, decay, modulation, eps);
    const long size = static_cast<long>(z.size());
    if (in.modulation) mdi<true>(in, size, h_new.data(), gamma.data());
    else mdi<false>(in, size, h_new.data(), gamma.data());
}

template <class T>
void backward(
    const In<T>& z, const In<T>& h, const In<T>& gate, const In<T>& decay, const In<T>& modulation, double eps,
    const In<T>& d_h_new, const In<T>& d_gamma, const Out<T>& d_z, const Out<T>& d_h, const Out<T>& d_gate,
    const Out<T>& d_decay, const Out<T>& d_modulation) {
    const nb::gil_scoped_release released;
    const auto in = inputs(z, h, gate, decay, modulation, eps);
    const long size = static_cast<long>(z.size());
    const MdiGradients<T> out{d_z.data(), d_h.data(), d_gate.data(), d_decay.data(), data_of(d_modulation)};
    if (in.modulation) mdi_backward<true>(in, size, d_h_new.data(), d_gamma.data(), out);
    else mdi_backward<false>(in, size, d_h_new.data(), d_gamma.data(), out);
}

template <class T> void bind(nb::module_& m) {
    m.def("mdi", &forward<T>, "z"_a.noconvert(), "h"_a.noconvert(), "gate"_a.noconvert(), "decay"_a.noconvert(),
          "modulation"_a.noconvert().none(), "eps"_a, "h_new"_a.noconvert(), "gamma"_a.noconvert());
    m.def("mdi_backward", &backward<T>, "z"_a.noconvert(), "h"_a.noconvert(), "gate"_a.noconvert(),
          "decay"_a.noconvert(), "modulation"_a.noconvert().none(), "eps"_a, "d_h_new"_a.noconvert(),
          "d_gamma"_a.noconvert(), "d_z"_a.noconvert(), "d_h"_a.noconvert(), "d_gate"_a.noconvert(),
          "d_decay"_a.noconvert(), "d_modulation"_a.noconvert().none());
}

}  // namespace

void bind_mdi(nb::module_& m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace srm
