"""`attention`: scaled dot-product attention."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.attention.spec import SPEC

_operator = define(SPEC)


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, backend: str | None = None,
) -> Any:  # fmt: skip
    """softmax(scale * query @ key^T + attn_mask) @ value, with the names and meaning of torch's
    `scaled_dot_product_attention`.

    query: (B, H, T, D).
    key: (B, G, S, D), with G = H, or with `enable_gqa` a divisor of H. value: (B, G, S, E).
    attn_mask: broadcasts to (B, H, T, S): any of its axes may be 1, and B, or B and H, may be left out. Boolean:
        True where a step attends. Else it is added to the scores: of query's dtype, or float32 beside half query;
        it may be -inf, and it has a gradient, which a boolean mask has not.
    is_causal: step t attends to slots s <= t, also where T differs from S. Not together with a mask.
    scale: a finite number; None: 1 / sqrt(D).
    enable_gqa: head h attends to the keys and values of head h // (H / G).
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns out (B, H, T, E) of query's dtype. A step with nothing to attend to (all of its scores masked or -inf, or
    S = 0) gives zeros, and zero gradients. NaN at a masked slot may or may not spread. Any extent may be 0. Half
    types accumulate in float32; the probabilities, and in the backward the gradient of the scores, may be rounded
    to them before they enter a product.

    Errors: `ContractError` for a shape, dtype or option that breaks the above; `NoBackendError` if no selected
    backend can run it. Source: Vaswani et al. 2017, eq. 1.

    >>> import numpy as np, srm_core
    >>> query, key = np.zeros((1, 1, 2, 1)), np.zeros((1, 1, 3, 1))
    >>> value = np.array([1.0, 3.0, 8.0]).reshape(1, 1, 3, 1)
    >>> srm_core.attention(query, key, value).ravel().tolist()
    [4.0, 4.0]
    >>> srm_core.attention(query, key, value, is_causal=True).ravel().tolist()
    [1.0, 2.0]
    """
    return _operator.run(backend, query, key, value, attn_mask, is_causal, scale, enable_gqa)
