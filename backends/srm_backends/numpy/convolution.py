"""The convolution on NumPy: pixel by pixel the columns that a kernel sees, and one matrix product for a block of them.

The columns (pixels, R*S*J) of a block are gathered from a padded image in channels-last order, where a kernel's
row is one run of S*J numbers, into a few megabytes that are used again for each block: the whole matrix, R*S times
the image, is never made. Gathering costs a fifth of the product at 64 channels and less above, so forms that save
gathering but split the product by kernel rows gain nothing. The product writes pixels by channels or, transposed,
channels by pixels, which is y itself in either memory format. A pointwise kernel needs no gathering. Where each
input channel is a group of its own there is no product to speak of: there the taps are multiplied and added.

Results between kernels have one pixel axis: (B, P*Q, O) in channels-last order, (B, O, P*Q) else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from srm_backends.numpy.common import Array
from srm_core.ops.common import is_channels_last
from srm_core.ops.conv_bn.convolution import Geometry, Pair

BLOCK = 1 << 22  # bytes of columns: from 2 MB on the product runs at its full speed, and they stay in the last cache
TAP_BLOCK = 1 << 20  # bytes of results where taps are added one by one
ROWS = 16  # that are summed in float32 at once

# What is done to each block of the result while the cache holds it: (block, its channels) -> None. A block is
# (images, pixels, channels), or (images, channels, pixels) where not channels-last.
Finish = Callable[[Array, slice], None]


def images_of(flat: Array, extent: Pair, channels_last: bool) -> Array:
    """(B, P*Q, O) or (B, O, P*Q) as a view (B, O, P, Q)."""
    if channels_last:
        return flat.reshape(len(flat), *extent, flat.shape[2]).transpose(0, 3, 1, 2)
    return flat.reshape(*flat.shape[:2], *extent)


def convolve(x: Array, weight: Array, g: Geometry, out: Array, finish: Finish, channels_last: bool) -> None:
    """out (B, P*Q, O), or (B, O, P*Q), from x (B, I, H, W) and weight (O, J, R, S), in the dtype of weight."""
    outer, inner = weight.shape[0] // g.groups, weight.shape[1]
    if inner == 1:
        _convolve_taps(x, weight, g, out, finish, channels_last)
        return
    for group in range(g.groups):
        channels, part = slice(group * outer, (group + 1) * outer), x[:, group * inner : (group + 1) * inner]
        w = matrix(weight[channels])  # (K, O/G)
        if channels_last:
            blocks = _gather(part, weight, g)
        else:
            blocks = (_images if _is_pointwise(weight, g) else _transposed)(part, weight, g)
        for images, pixels, columns in blocks:
            target = out[images, pixels, channels] if channels_last else out[images, channels, pixels]
            block = target if out.dtype == weight.dtype else np.empty(target.shape, weight.dtype)
            if not channels_last:
                np.matmul(w.T, columns, out=block)
            elif block.flags.c_contiguous:  # several small images as one product
                np.matmul(columns.reshape(-1, len(w)), w, out=block.reshape(-1, outer))
            else:
                np.matmul(columns, w, out=block)
            finish(block, channels)
            if block is not target:
                target[...] = block


def weight_gradient(x: Array, grad: Array, like: Array, g: Geometry) -> Array:
    """The gradient of the weight, like `like` (O, J, R, S), from that of the result, (B, P*Q, O)."""
    if like.shape[1] == 1:
        return _weight_gradient_taps(x, grad, like, g)
    outer, inner = like.shape[0] // g.groups, like.shape[1]
    d_weight = np.zeros((like.shape[0], *like.shape[2:], inner), grad.dtype)  # (O, R, S, J)
    for group in range(g.groups):
        channels, part = slice(group * outer, (group + 1) * outer), x[:, group * inner : (group + 1) * inner]
        total = d_weight[channels].reshape(outer, -1)  # (O/G, K)
        for images, pixels, columns in _gather(part, like, g):
            of_pixels = grad[images, pixels, channels].reshape(-1, outer)
            total += of_pixels.T @ columns.reshape(-1, total.shape[1])
    return d_weight.transpose(0, 3, 1, 2)


def input_gradient(grad: Array, weight: Array, g: Geometry, out: Array, extent: Pair) -> None:
    """The gradient of x, written to out (B, I, H, W), from that of the result, (B, P*Q, O)."""
    kernel = weight.shape[2:]
    spans = tuple(d * (k - 1) for d, k in zip(g.dilation, kernel, strict=True))
    fits = all(pad <= span for pad, span in zip(g.padding, spans, strict=True))
    if g.stride != (1, 1) or not fits or weight.shape[1] == 1:
        _input_gradient_taps(grad, weight, g, out, extent)
        return
    # A convolution of the gradient with the kernels turned round, inputs and outputs exchanged.
    top, left = (span - pad for span, pad in zip(spans, g.padding, strict=True))
    turned = weight.reshape(g.groups, -1, *weight.shape[1:]).swapaxes(1, 2)[..., ::-1, ::-1]
    turned = turned.reshape(-1, weight.shape[0] // g.groups, *kernel)
    channels_last = is_channels_last(out)
    pixels = out.shape[2] * out.shape[3]
    if channels_last:
        flat = out.transpose(0, 2, 3, 1).reshape(len(out), pixels, out.shape[1])
    else:
        flat = out.reshape(*out.shape[:2], pixels)
    images = images_of(grad, extent, channels_last=True)
    convolve(images, turned, Geometry((1, 1), (top, left), g.dilation, g.groups), flat, _nothing, channels_last)


def matrix(weight: Array) -> Array:
    """Kernels (O, J, R, S) as the matrix (R*S*J, O) that columns are multiplied by."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, len(weight))


def sum_rows(values: Array) -> Array:
    """The sum of (..., O) over all but the last axis, in float64 of sums of 16 rows.

    Within those it is a matrix product, several times as fast as NumPy's sum of rows.
    """
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    whole = len(rows) // ROWS * ROWS
    parts = np.ones(ROWS, rows.dtype) @ rows[:whole].reshape(whole // ROWS, ROWS, rows.shape[1])
    total: Array = parts.sum(0, dtype="float64") + rows[whole:].sum(0, dtype="float64")
    return total


def _nothing(block: Array, channels: slice) -> None: ...


def _is_pointwise(weight: Array, g: Geometry) -> bool:
    return weight.shape[2:] == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0)


Block = tuple[slice, slice, Array]


def _gather(x: Array, weight: Array, g: Geometry) -> Iterator[Block]:
    """(images, pixels, their columns (images, pixels, K)) of x (B, J, H, W), in blocks. The columns are overwritten."""
    (batch, channels, height, width), (r, s) = x.shape, weight.shape[2:]
    (p, q), k, dtype = g.extent((height, width), (r, s)), r * s * channels, weight.dtype
    pixels = max(1, BLOCK // (max(k, len(weight) // g.groups) * dtype.itemsize))
    count = max(1, min(batch, pixels // (p * q)))
    rows = min(p, max(1, pixels // q))  # p where there are several images
    pointwise, last = _is_pointwise(weight, g), x.transpose(0, 2, 3, 1)
    as_it_is = pointwise and last.flags.c_contiguous and x.dtype == dtype
    (top, left), (down, right), (below, beside) = g.padding, g.stride, g.dilation
    padded = np.zeros((0 if as_it_is else count, height + 2 * top, width + 2 * left, channels), dtype)
    b_step, h_step, w_step, c_step = padded.strides
    windows = as_strided(
        padded, (len(padded), p, q, r, s, channels),
        (b_step, down * h_step, right * w_step, below * h_step, beside * w_step, c_step),
    )  # fmt: skip
    memory = np.empty(0 if pointwise else count * rows * q * k, dtype)
    for first in range(0, batch, count):
        images = slice(first, min(batch, first + count))
        n = images.stop - first
        if not as_it_is:
            padded[:n, top : top + height, left : left + width] = last[images]
        for row in range(0, p, rows):
            part = slice(row, min(p, row + rows))
            if pointwise:
                columns = (last[images] if as_it_is else padded[:n])[:, part]
            else:
                window = windows[:n, part]
                columns = memory[: window.size].reshape(window.shape)
                np.copyto(columns, window)
            m = columns.shape[1] * q
            yield images, slice(row * q, row * q + m), columns.reshape(n, m, k)


def _transposed(x: Array, weight: Array, g: Geometry) -> Iterator[Block]:
    """As `_gather`, with the columns (images, K, pixels)."""
    for images, pixels, columns in _gather(x, weight, g):
        yield images, pixels, columns.swapaxes(1, 2)


def _images(x: Array, weight: Array, g: Geometry) -> Iterator[Block]:
    """The columns (1, K, pixels) of a pointwise kernel are the image itself."""
    for b in range(len(x)):
        image = np.ascontiguousarray(x[b : b + 1], weight.dtype)
        yield slice(b, b + 1), slice(None), image.reshape(1, x.shape[1], -1)


# Tap by tap. I = G, M = O / G; images are viewed as (I, H, W) and results as (I, M, P, Q) whatever their order.


def _tap_blocks(
    x: Array, weight: Array, g: Geometry, channels_last: bool
) -> Iterator[tuple[int, slice, list[tuple[int, int, Array]]]]:
    """(image, pixels, (r, s, window (I, rows, Q)) of each tap), in blocks of rows."""
    (batch, channels, height, width), kernel, dtype = x.shape, weight.shape[2:], weight.dtype
    p, q = g.extent((height, width), kernel)
    padded = _padded_image(channels, (height, width), g, dtype, channels_last)
    (top, left) = g.padding
    rows = max(1, TAP_BLOCK // (q * len(weight) * dtype.itemsize))
    for b in range(batch):
        padded[:, top : top + height, left : left + width] = x[b]
        for row in range(0, p, rows):
            part = slice(row, min(p, row + rows))
            taps = [(r, s, _window(padded, r, s, part, q, g)) for r, s in np.ndindex(*kernel)]
            yield b, slice(part.start * q, part.stop * q), taps


def _padded_image(channels: int, image: Pair, g: Geometry, dtype: Any, channels_last: bool) -> Array:
    """Zeros (C, H + padding, W + padding) in either order."""
    h, w = (n + 2 * pad for n, pad in zip(image, g.padding, strict=True))
    return np.zeros((h, w, channels), dtype).transpose(2, 0, 1) if channels_last else np.zeros((channels, h, w), dtype)


def _window(padded: Array, r: int, s: int, rows: slice, q: int, g: Geometry) -> Array:
    """What tap (r, s) sees for some rows of the result: a view (C, rows, Q) of the padded image."""
    top, left = rows.start * g.stride[0] + r * g.dilation[0], s * g.dilation[1]
    bottom, right = top + (rows.stop - rows.start - 1) * g.stride[0] + 1, left + (q - 1) * g.stride[1] + 1
    return padded[:, top : bottom : g.stride[0], left : right : g.stride[1]]


def _convolve_taps(x: Array, weight: Array, g: Geometry, out: Array, finish: Finish, channels_last: bool) -> None:
    multiplier = len(weight) // g.groups
    kernels = weight.reshape(g.groups, multiplier, 1, 1, *weight.shape[2:])
    for b, pixels, taps in _tap_blocks(x, weight, g, channels_last):
        target = out[b : b + 1, pixels] if channels_last else out[b : b + 1, :, pixels]
        block = target if out.dtype == weight.dtype else np.empty(target.shape, weight.dtype)
        rows, q = taps[0][2].shape[1:]
        sums = images_of(block, (rows, q), channels_last)[0].reshape(g.groups, multiplier, rows, q)
        sums[...] = 0
        for r, s, window in taps:
            sums += window[:, None] * kernels[..., r, s]
        finish(block, slice(None))
        if block is not target:
            target[...] = block


def _weight_gradient_taps(x: Array, grad: Array, like: Array, g: Geometry) -> Array:
    d_weight = np.zeros(like.shape, grad.dtype)
    for b, pixels, taps in _tap_blocks(x, like, g, channels_last=True):
        block = grad[b, pixels].reshape(-1, taps[0][2].shape[2], g.groups, len(like) // g.groups)
        for r, s, window in taps:
            terms = window.transpose(1, 2, 0)[..., None] * block  # (rows, Q, I, M)
            d_weight[:, 0, r, s] += sum_rows(terms.reshape(*terms.shape[:2], len(like)))
    return d_weight


def _input_gradient_taps(grad: Array, weight: Array, g: Geometry, out: Array, extent: Pair) -> None:
    """Each tap gives what it was given back to its window: any geometry, and any groups."""
    (batch, channels, height, width), (p, q), (r, s) = out.shape, extent, weight.shape[2:]
    outer, inner, (top, left) = len(weight) // g.groups, weight.shape[1], g.padding
    padded = _padded_image(channels, (height, width), g, weight.dtype, channels_last=True)
    numbers = (TAP_BLOCK if inner == 1 else BLOCK // (r * s)) // weight.dtype.itemsize
    rows = max(1, numbers // (q * channels))
    backs = [matrix(part).T for part in weight.reshape(g.groups, outer, inner, r, s)]  # (O/G, K)
    by_tap = weight.reshape(g.groups, outer, r, s)[..., None, None] if inner == 1 else None
    for b in range(batch):
        padded[...] = 0
        for row in range(0, p, rows):
            part = slice(row, min(p, row + rows))
            m, block = part.stop - row, grad[b, row * q : part.stop * q]  # (pixels, O)
            if by_tap is not None:
                given = block.reshape(m, q, g.groups, outer).transpose(2, 3, 0, 1)
                for i, j, k in np.ndindex(r, s, outer):
                    _window(padded, i, j, part, q, g)[...] += given[:, k] * by_tap[:, k, i, j]
                continue
            for group, back in enumerate(backs):
                given = (block[:, group * outer : (group + 1) * outer] @ back).reshape(m, q, r, s, inner)
                own = padded[group * inner : (group + 1) * inner]
                for i, j in np.ndindex(r, s):
                    _window(own, i, j, part, q, g)[...] += given[:, :, i, j].transpose(2, 0, 1)
        out[b] = padded[:, top : top + height, left : left + width]
