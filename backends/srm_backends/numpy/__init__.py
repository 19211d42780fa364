"""The `numpy` backend: vectorised, the embedded default."""
