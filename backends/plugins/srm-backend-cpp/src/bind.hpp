// What the bindings share. Python's side (`arrays.py`) sees to alignment and contiguity; kernels run without the GIL.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace srm {

namespace nb = nanobind;
using namespace nb::literals;

template <class T> using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T> using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <class T> using Strided = nb::ndarray<const T, nb::ndim<3>, nb::device::cpu>;
using Integers = In<int64_t>;

template <class A> long extent(const A& array, int axis) { return static_cast<long>(array.shape(axis)); }

// The data, or null where None was given.
template <class A> auto data_of(const A& array) -> decltype(array.data()) {
    return array.is_valid() ? array.data() : nullptr;
}

void bind_scan(nb::module_& m);
void bind_mix(nb::module_& m);
void bind_mdi(nb::module_& m);
void bind_mdi_recurrence(nb::module_& m);
void bind_lstm(nb::module_& m);
void bind_attention(nb::module_& m);

}  // namespace srm
