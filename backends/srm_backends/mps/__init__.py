"""The `mps` backend: torch's operations on Apple GPUs, with Metal kernels of our own for `scan` and `recurrent_step`."""
