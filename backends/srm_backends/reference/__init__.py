"""The `reference` backend: each operator's own float64 loops. Slow, and always there."""
