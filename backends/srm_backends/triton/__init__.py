"""Kernels in Triton, for NVIDIA GPUs, and for AMD's as far as Triton carries them there."""
