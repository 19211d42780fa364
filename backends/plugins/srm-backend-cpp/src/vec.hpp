// Vectors of the width that the instruction set has, and the same names for single numbers.
#pragma once

#include <cstring>

namespace srm {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(VECTOR_BYTES))); };

template <class T> using Vec = typename VectorOf<T>::type;
template <class T> constexpr long LANES = VECTOR_BYTES / sizeof(T);

// V is T or Vec<T>; memory is aligned for T alone.
template <class V, class T> inline V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class V, class T> inline void store(T* to, V value) { std::memcpy(to, &value, sizeof value); }

template <class V, class T> inline V splat(T value) { return V{} + value; }

}  // namespace srm
