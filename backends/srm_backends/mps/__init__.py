"""The `mps` backend: torch on Apple GPUs, with Metal kernels of our own for `scan` and `recurrent_step`."""
