"""The `torch` backend: each operator as the best that PyTorch itself offers, on CPU and CUDA, differentiable."""
