"""The `cpp` backend: C++17 with OpenMP and SIMD, on NumPy arrays and, through the registry's views, on CPU tensors."""
