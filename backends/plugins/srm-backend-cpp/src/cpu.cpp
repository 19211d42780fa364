// Which level of the x86-64 instruction set this CPU has; compiled for every CPU.
#include <nanobind/nanobind.h>

NB_MODULE(_cpu, m) {
    m.def("level", [] {
#if defined(__x86_64__)
        __builtin_cpu_init();
        const auto v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
        const auto v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
        return v4 ? 4 : v3 ? 3 : 1;
#else
        return 1;
#endif
    });
}
