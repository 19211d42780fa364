// What differs between the Metal Shading Language and C++17, in which the tests compile the same kernels.
//
// A kernel is a function template KERNEL(...) whose last parameter is the position of its thread, uint3, and whose
// others are buffers: pointers, and one reference to a struct of longs. INSTANCE(name, kernel, types...) gives it a
// name on the host.
#pragma once

#ifdef __METAL_VERSION__

#include <metal_stdlib>
using namespace metal;

#define BUFFER(n) [[buffer(n)]]
#define POSITION [[thread_position_in_grid]]
#define KERNEL [[kernel]]
#define INSTANCE(name, function, ...) \
  template [[host_name(#name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;
#define HAS_BFLOAT (__METAL_VERSION__ >= 310)

#else

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef device  // a compiler that knows address spaces may be told to check them
#define device
#define constant const
#endif
#define BUFFER(n)
#define POSITION
#define KERNEL
#define HAS_BFLOAT 1

using uint = std::uint32_t;
struct uint3 {
  uint x, y, z;
};

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct bfloat {
  std::uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {  // to the nearest, ties to even
    const std::uint32_t wide = bits_of(value);
    bits = value != value ? 0x7fc0 : std::uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
  operator float() const { return float_of(std::uint32_t(bits) << 16); }
};

struct half {
  std::uint16_t bits;
  half() = default;
  explicit half(float value) {
    const std::uint16_t sign = std::uint16_t((bits_of(value) >> 16) & 0x8000);
    const float size = std::fabs(value);
    if (value != value) {
      bits = 0x7e00;
    } else if (size >= 65520.0f) {
      bits = sign | 0x7c00;
    } else {
      // In units of the last of 11 bits; what rounds up to a power of two carries into the exponent by itself.
      const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
      const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
      bits = sign | std::uint16_t(((exponent + 14) << 10) + units);
    }
  }
  operator float() const {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float size = std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
  }
};

// One parameter of a kernel: a buffer in its place, or, last of all, the position of the thread.
template <typename P>
P parameter(void* const* buffers, std::size_t place, uint3 at) {
  if constexpr (std::is_same_v<P, uint3>) {
    return at;
  } else if constexpr (std::is_reference_v<P>) {
    return *static_cast<std::remove_reference_t<P>*>(buffers[place]);
  } else {
    return static_cast<P>(buffers[place]);
  }
}

template <typename... P, std::size_t... I>
void run_thread(void (*kernel)(P...), std::index_sequence<I...>, void* const* buffers, uint3 at) {
  kernel(parameter<P>(buffers, I, at)...);
}

// Every thread of a grid, one after the other.
template <typename... P>
void run_grid(void (*kernel)(P...), void* const* buffers, uint3 grid) {
  for (uint z = 0; z < grid.z; ++z)
    for (uint y = 0; y < grid.y; ++y)
      for (uint x = 0; x < grid.x; ++x) run_thread(kernel, std::index_sequence_for<P...>{}, buffers, {x, y, z});
}

#define INSTANCE(name, function, ...)                              \
  extern "C" void name(void* const* buffers, uint x, uint y, uint z) { \
    run_grid(&function<__VA_ARGS__>, buffers, {x, y, z});          \
  }

#endif
