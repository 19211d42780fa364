"""Convolutions as matrix products whose left side is never made: a row is a pixel, gathered tap by tap.

    y[b, o, p, q] = sum over j, r, s of weight[o, j, r, s] x[b, i, p sh + r dh - ph, q sw + s dw - pw]

A program has BLOCK_M pixels of y and BLOCK_N channels of a group. With BACK it is the gradient of x out of that of y:
the same sum, in which a tap asks whether a pixel took from it. Groups of few channels have a kernel without matrix
units. In the gradient of the weights pixels are what is summed over, and SPLITS programs share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.autotune import FLOPS, Question, choose
from srm_backends.triton.common import dot
from srm_backends.triton.launch import Config, blocks, launch, multiprocessors, power_of_2
from srm_backends.triton.tiles import available, describe
from srm_core.context import LaunchContext
from srm_core.ops.conv_bn.convolution import Geometry

NARROW = 8  # channels of a group, up to which matrix units would be idle for the most part
LINE, STATISTICS = tl.constexpr(1), tl.constexpr(2)  # what follows a convolution; 0: nothing


@triton.jit
def line_of(mean, var, bias, gamma, beta, o, there, eps):
    """(scale, shift) of channels o, with which what follows a convolution is scale * c + shift. Any may be None."""
    scale = tl.full(o.shape, 1.0, tl.float32)
    shift = tl.zeros(o.shape, tl.float32)
    if var is not None:
        scale = 1 / tl.sqrt_rn(tl.load(var + o, there, other=1).to(tl.float32) + eps)
    if gamma is not None:
        scale *= tl.load(gamma + o, there, other=0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + o, there, other=0).to(tl.float32)
    if mean is not None:
        shift -= tl.load(mean + o, there, other=0).to(tl.float32)
    shift *= scale
    if beta is not None:
        shift += tl.load(beta + o, there, other=0).to(tl.float32)
    return scale, shift


@triton.jit
def _source(at, tap, step, dilation, size, BACK: tl.constexpr):
    """(where a tap falls along an axis, is it inside). at: of tap 0; with BACK of a pixel that may see it."""
    if BACK:
        back = at - tap * dilation
        place = back // step
        inside = (back >= 0) & (back % step == 0) & (place < size)
    else:
        place = at + tap * dilation
        inside = (place >= 0) & (place < size)
    return place, inside


@triton.jit
def _first(place, step, pad, BACK: tl.constexpr):
    if BACK:
        at = place + pad
    else:
        at = place * step - pad
    return at


@triton.jit
def _ended(acc, scale, shift, RELU: tl.constexpr):
    acc = acc * scale[None, :] + shift[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0, acc)
    return acc


@triton.jit
def _store(result, y, b, p, q, o, inside, yb, yo, yp, yq):
    at = b.to(tl.int64) * yb + p.to(tl.int64) * yp + q.to(tl.int64) * yq
    tl.store(y + at[:, None] + (o.to(tl.int64) * yo)[None, :], result, inside)


@triton.jit
def _statistics(result, inside, there_m, tile_means, tile_spreads, tile_counts, tile, o, there_o, O):
    """Of a tile of what is stored, which is 0 outside."""
    count, values = tl.sum(there_m.to(tl.float32), 0), result.to(tl.float32)
    of_tile = tl.sum(values, 0) * (1 / count)
    away = tl.where(inside, values - of_tile[None, :], 0)
    tl.store(tile_counts + tile, count)
    tl.store(tile_means + tile * O + o, of_tile, there_o)
    tl.store(tile_spreads + tile * O + o, tl.sum(away * away, 0), there_o)


@triton.jit(do_not_specialize=["eps"])
def convolve_blocks(
    x, weight, y, mean, var, bias, gamma, beta, tile_means, tile_spreads, tile_counts, eps,
    tiles_n, groups, pixels, C, N, O, H, W, P, Q, R, S, sh, sw, ph, pw, dh, dw,
    xb, xc, xh, xw, wg, wn, wc, wr, ws, yb, yo, yp, yq,
    BACK: tl.constexpr, AFTER: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (B, O, P, Q) of x (B, groups * C, H, W) and weight (groups, N, C, R, S), O = groups * N."""
    unit = tl.program_id(0)
    of_n, unit = unit % tiles_n, unit // tiles_n
    group, tile = unit % groups, unit // groups
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there_m = m < pixels
    n = of_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there_n = n < N
    q, rest = m % Q, m // Q
    p, b = rest % P, rest // P
    at_h, at_w = _first(p, sh, ph, BACK), _first(q, sw, pw, BACK)
    k = tl.arange(0, BLOCK_K)
    # Where tap 0 of channel k falls, outside or not; a tap and a block of channels are then a step for all alike.
    image = b.to(tl.int64) * xb + group.to(tl.int64) * C * xc
    if not BACK:
        image += at_h.to(tl.int64) * xh + at_w.to(tl.int64) * xw
    image = x + image[:, None] + (k.to(tl.int64) * xc)[None, :]
    kernel = weight + group.to(tl.int64) * wg + (n.to(tl.int64) * wn)[None, :] + (k.to(tl.int64) * wc)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    per_tap = tl.cdiv(C, BLOCK_K)
    for i in tl.range(0, R * S * per_tap):
        tap, start = i // per_tap, i % per_tap * BLOCK_K
        r, s = tap // S, tap % S
        h, inside_h = _source(at_h, r, sh, dh, H, BACK)
        w, inside_w = _source(at_w, s, sw, dw, W, BACK)
        inside, there_k = (inside_h & inside_w & there_m)[:, None], start + k < C
        if BACK:
            step = (h.to(tl.int64) * xh + w.to(tl.int64) * xw)[:, None] + start * xc
        else:
            step = r * dh * xh + s * dw * xw + start * xc
        if EVEN:
            seen = tl.load(image + step, inside, other=0)
            taps = tl.load(kernel + (start * wc + r * wr + s * ws), there_n[None, :], other=0)
        else:
            seen = tl.load(image + step, inside & there_k[None, :], other=0)
            taps = tl.load(
                kernel + (start * wc + r * wr + s * ws), there_k[:, None] & there_n[None, :], other=0
            )  # fmt: skip
        acc = dot(seen, taps, PRECISION, acc)
    o = group * N + n
    inside = there_m[:, None] & there_n[None, :]
    if AFTER == LINE:
        scale, shift = line_of(mean, var, bias, gamma, beta, o, there_n, eps)
        acc = _ended(acc, scale, shift, RELU)
    result = acc.to(y.dtype.element_ty)
    _store(result, y, b, p, q, o, inside, yb, yo, yp, yq)
    if AFTER == STATISTICS:
        _statistics(result, inside, there_m, tile_means, tile_spreads, tile_counts, tile, o, there_n, O)


@triton.jit(do_not_specialize=["eps"])
def convolve_tiles(
    y, mean, var, bias, gamma, beta, tile_means, tile_spreads, tile_counts, eps, image, kernel, of_y,
    tiles_n, tiles_q, tiles_p, C, O, P, Q, B, R, S, ph, pw, dh, dw, yb, yo, yp, yq,
    BACK: tl.constexpr, AFTER: tl.constexpr, RELU: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `convolve_blocks` of one group and stride 1; a tile of pixels is a box of images, which the hardware copies as
    a tap sees it, with its padding. image: x (B, H, W, C); kernel: weight (O, R, S, C), with BACK (C, R, S, O); of_y: y
    (B, P, Q, O), or None."""
    PIXELS: tl.constexpr = BLOCK_B * BLOCK_P * BLOCK_Q
    unit = tl.program_id(0)
    of_n, tile = unit % tiles_n, unit // tiles_n
    of_q, rest = tile % tiles_q, tile // tiles_q
    of_p, of_b = rest % tiles_p, rest // tiles_p
    o = of_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scale, shift = 0, 0
    if AFTER == LINE:
        scale, shift = line_of(mean, var, bias, gamma, beta, o, o < O, eps)
    acc = tl.zeros((PIXELS, BLOCK_N), tl.float32)
    per_tap = tl.cdiv(C, BLOCK_K)
    for i in tl.range(0, R * S * per_tap):
        tap, c = i // per_tap, i % per_tap * BLOCK_K
        r, s = tap // S, tap % S
        at_p, at_q = of_p * BLOCK_P + r * dh - ph, of_q * BLOCK_Q + s * dw - pw
        seen = tl.reshape(image.load([of_b * BLOCK_B, at_p, at_q, c]), (PIXELS, BLOCK_K))
        if BACK:
            taps = tl.reshape(kernel.load([c, r, s, of_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
        else:
            taps = tl.trans(tl.reshape(kernel.load([of_n * BLOCK_N, r, s, c]), (BLOCK_N, BLOCK_K)))
        acc = tl.dot(seen, taps, acc)
    m = tl.arange(0, PIXELS)
    q, p = of_q * BLOCK_Q + m % BLOCK_Q, of_p * BLOCK_P + m // BLOCK_Q % BLOCK_P
    b = of_b * BLOCK_B + m // (BLOCK_P * BLOCK_Q)
    there_m = (b < B) & (p < P) & (q < Q)
    inside = there_m[:, None] & (o < O)[None, :]
    if AFTER == LINE:
        acc = _ended(acc, scale, shift, RELU)
    if AFTER == STATISTICS:
        acc = tl.where(inside, acc, 0)
    result = acc.to(y.dtype.element_ty)
    if of_y is not None:
        box = tl.reshape(result, (BLOCK_B, BLOCK_P, BLOCK_Q, BLOCK_N))
        of_y.store([of_b * BLOCK_B, of_p * BLOCK_P, of_q * BLOCK_Q, of_n * BLOCK_N], box)
    else:
        _store(result, y, b, p, q, o, inside, yb, yo, yp, yq)
    if AFTER == STATISTICS:
        _statistics(result, inside, there_m, tile_means, tile_spreads, tile_counts, tile, o, o < O, O)


@triton.jit(do_not_specialize=["eps"])
def convolve_narrow(
    x, weight, y, mean, var, bias, gamma, beta, tile_means, tile_spreads, tile_counts, eps,
    tiles_n, pixels, C, N, O, H, W, P, Q, R, S, sh, sw, ph, pw, dh, dw,
    xb, xc, xh, xw, wg, wn, wc, wr, ws, yb, yo, yp, yq,
    BACK: tl.constexpr, AFTER: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `convolve_blocks`, with channels of several groups in a tile: each looks at its own."""
    of_n, tile = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there_m = m < pixels
    o = of_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there_o = o < O
    group = (o // N).to(tl.int64)
    q, rest = m % Q, m // Q
    p, b = rest % P, rest // P
    at_h, at_w = _first(p, sh, ph, BACK), _first(q, sw, pw, BACK)
    image = b.to(tl.int64) * xb
    kernel = weight + group * wg + (o % N) * wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, R * S * C):
        tap, c = i // C, i % C
        r, s = tap // S, tap % S
        h, inside_h = _source(at_h, r, sh, dh, H, BACK)
        w, inside_w = _source(at_w, s, sw, dw, W, BACK)
        at = image + h.to(tl.int64) * xh + w.to(tl.int64) * xw
        inside = (inside_h & inside_w & there_m)[:, None] & there_o[None, :]
        seen = tl.load(x + at[:, None] + ((group * C + c) * xc)[None, :], inside, other=0)
        taps = tl.load(kernel + c * wc + r * wr + s * ws, there_o, other=0)
        acc += seen.to(tl.float32) * taps.to(tl.float32)[None, :]
    inside = there_m[:, None] & there_o[None, :]
    if AFTER == LINE:
        scale, shift = line_of(mean, var, bias, gamma, beta, o, there_o, eps)
        acc = _ended(acc, scale, shift, RELU)
    result = acc.to(y.dtype.element_ty)
    _store(result, y, b, p, q, o, inside, yb, yo, yp, yq)
    if AFTER == STATISTICS:
        _statistics(result, inside, there_m, tile_means, tile_spreads, tile_counts, tile, o, there_o, O)


@triton.jit
def weight_gradient_blocks(
    grad, x, parts, tiles_n, tiles_c, taps, groups, share, pixels, C, N, H, W, P, Q, S, sh, sw, ph, pw, dh, dw,
    xb, xc, xh, xw, gb, go, gp, gq,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts (SPLITS, groups, taps, N, C): of grad (B, groups * N, P, Q) against x (B, groups * C, H, W), each of
    `share` pixels."""
    unit = tl.program_id(0)
    of_c, unit = unit % tiles_c, unit // tiles_c
    of_n, unit = unit % tiles_n, unit // tiles_n
    tap, unit = unit % taps, unit // taps
    group, split = unit % groups, unit // groups
    r, s = tap // S, tap % S
    n, c = of_n * BLOCK_N + tl.arange(0, BLOCK_N), of_c * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_n, channel_c = group.to(tl.int64) * N + n, group.to(tl.int64) * C + c
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = split * share
    last = tl.minimum(pixels, first + share)
    for start in tl.range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        there = m < last
        q, rest = m % Q, m // Q
        p, b = rest % P, (rest // P).to(tl.int64)
        h, inside_h = _source(p * sh - ph, r, sh, dh, H, False)
        w, inside_w = _source(q * sw - pw, s, sw, dw, W, False)
        at = b * gb + p.to(tl.int64) * gp + q.to(tl.int64) * gq
        became = tl.load(grad + at[None, :] + (channel_n * go)[:, None], there[None, :] & (n < N)[:, None], other=0)
        at = b * xb + h.to(tl.int64) * xh + w.to(tl.int64) * xw
        inside = there & inside_h & inside_w
        saw = tl.load(x + at[:, None] + (channel_c * xc)[None, :], inside[:, None] & (c < C)[None, :], other=0)
        acc = dot(became, saw, PRECISION, acc)
    at = ((split.to(tl.int64) * groups + group) * taps + tap) * N * C
    tl.store(parts + at + n[:, None] * C + c[None, :], acc, (n < N)[:, None] & (c < C)[None, :])


class After(NamedTuple):
    """The vectors (O,) of what follows a convolution, each of them or None, and its activation."""

    mean: Tensor | None = None
    var: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    eps: float = 0.0
    relu: bool = False


def images(ctx: LaunchContext, shape: tuple[int, ...], dtype: Any, last: bool) -> Tensor:
    """(B, C, H, W), in channels-last order if `last`."""
    batch, channels, height, width = shape
    if not last:
        return ctx.empty(shape, dtype)
    found: Tensor = ctx.empty((batch, height, width, channels), dtype)
    return found.permute(0, 3, 1, 2)


def channels_dense(weight: Tensor) -> Tensor:
    """Weights with channels dense, which is what loads of 16 bytes need."""
    dense = weight.stride(1) == 1 or weight.shape[1] == 1
    return weight if dense else weight.contiguous(memory_format=torch.channels_last)


class Cut(NamedTuple):
    """kind: of kernel. blocks: its last constants."""

    kind: str
    warps: int
    stages: int
    blocks: tuple[int, ...]


class Way(NamedTuple):
    """How a convolution is done. tiles: of pixels. described: what the hardware copies tiles of x, weight and
    y with, y's or None."""

    cut: Cut
    tiles: int
    described: tuple[Any, ...] = ()


def _plain(x: Tensor, weight: Tensor, y: Tensor, g: Geometry, back: bool) -> list[Cut]:
    """The ways to cut the work without the hardware's tiles, the first as measured on an H200."""
    outer, inner = len(weight) // g.groups, weight.shape[1]
    n, c = (inner, outer) if back else (outer, inner)  # channels of a group, made and read
    if g.groups > 1 and min(n, c) <= NARROW:
        return [Cut("narrow", 4, 3, (32, power_of_2(y.shape[1], 16, 128)))]
    if x.dtype is torch.float32:
        return [Cut("blocks", 4, 2, (64, power_of_2(n, 16, 64), power_of_2(c, 16, 32)))]
    block_n, block_k = power_of_2(n, 16, 128), power_of_2(c, 16, 64)
    found = [Cut("blocks", 4, 3, (128, block_n, block_k)), Cut("blocks", 8, 3, (128, block_n, block_k))]
    return [*found, Cut("blocks", 4, 3, (128, 64, block_k))] if block_n > 64 else found


def _tiled(ctx: LaunchContext, x: Tensor, weight: Tensor, y: Tensor, g: Geometry, back: bool) -> list[Cut]:
    """With them."""
    if x.dtype is torch.float32 or g.groups > 1 or g.stride != (1, 1) or not available(ctx):
        return []
    block_n, block_k, pair = power_of_2(y.shape[1], 16, 256), power_of_2(x.shape[1], 16, 64), min(2, len(y))
    box = 1 if block_n == 256 else pair
    found = [Cut("tiles", 8 if block_n == 128 else 4, 3, (box, 8, 8, block_n, block_k))]
    for wide in (block_n, block_n // 2):
        for box, warps in ((pair, 8), (pair, 4), (1, 4)):
            if wide >= 16 and box * 64 * wide <= warps * 4096:
                found.append(Cut("tiles", warps, 4 if wide <= 128 else 3, (box, 8, 8, wide, block_k)))
    return [c for c in dict.fromkeys(found) if _tiled_way(c, x, weight, y, back)]


def _tiled_way(cut: Cut, x: Tensor, weight: Tensor, y: Tensor, back: bool) -> Way | None:
    """None if the hardware has no such tiles of these tensors."""
    box, (block_n, block_k) = cut.blocks[:3], cut.blocks[3:]
    of_weight = (block_k, 1, 1, block_n) if back else (block_n, 1, 1, block_k)
    described = describe(x.permute(0, 2, 3, 1), (*box, block_k)), describe(weight.permute(0, 2, 3, 1), of_weight)
    if None in described:
        return None
    tiles = blocks(len(y), box[0]) * blocks(y.shape[2], box[1]) * blocks(y.shape[3], box[2])
    return Way(cut, tiles, (*described, describe(y.permute(0, 2, 3, 1), (*box, block_n))))


def best_way(
    ctx: LaunchContext, x: Tensor, weight: Tensor, y: Tensor, g: Geometry, run: Callable[[Way], Any], name: str
) -> Way:
    """For y of x. name: of the operation, `run` does it; "gradient": y is that of the image, x that of the result."""
    back = name == "gradient"
    order = x.stride(1) == 1, weight.stride(1) == 1, y.stride(1) == 1

    def way_of(cut: Cut) -> Way:
        if cut.kind == "tiles":
            if found := _tiled_way(cut, x, weight, y, back):
                return found
            cut = _plain(x, weight, y, g, back)[0]  # other strides than those of the call for which it was chosen
        return Way(cut, blocks(y.numel() // y.shape[1], cut.blocks[0]))

    def ask() -> Question:
        taps, channels = weight.shape[2:].numel(), x.shape[1] // g.groups
        sizes = (*(power_of_2(size, 1, 1 << 40) for size in (*y.shape, channels)), taps)
        bucket = (str(x.dtype)[6:], *sizes, g.groups > 1, g.stride == (1, 1), *order, ctx.precision)
        cuts = [*_tiled(ctx, x, weight, y, g, back), *_plain(x, weight, y, g, back)]
        return Question(bucket, 2 * y.numel() * channels * taps >= FLOPS, cuts)

    return way_of(choose(ctx, f"convolution_{name}", order, ask, lambda cut: run(way_of(cut))))


def convolve(
    ctx: LaunchContext, way: Way, x: Tensor, weight: Tensor, y: Tensor, g: Geometry, after: After | None,
    statistics: tuple[Tensor, ...] = (), back: bool = False,
) -> None:  # fmt: skip
    """y of x and weight, or with `back` the gradient of the image out of that of the result.

    statistics: float32 for the mean and the sum of squared differences of each tile, (tiles, O), and for the number of
    its pixels, (tiles,).
    """
    (batch, out, p, q), (_, _, h, w), (_, _, r, s) = y.shape, x.shape, weight.shape
    outer, inner = len(weight) // g.groups, weight.shape[1]
    wo, wj, wr, ws = weight.stride()
    n, c, strides_w = (inner, outer, (outer * wo, wj, wo)) if back else (outer, inner, (outer * wo, wo, wj))
    strides = (*x.stride(), *strides_w, wr, ws, *y.stride())
    geometry: tuple[int, ...] = (*g.stride, *g.padding, *g.dilation)
    turned = back
    if back and g.stride == (1, 1):  # taps go the other way, and that is all
        turned, geometry = False, (1, 1, *(-n for n in (*g.padding, *g.dilation)))
    pixels = batch * p * q
    kind = STATISTICS.value if statistics else LINE.value if after else 0
    vectors, eps, relu = (after[:5], after.eps, after.relu) if after else ((None,) * 5, 0.0, False)
    precision = "tf32" if ctx.precision == "tf32" else "ieee"
    ends = (*vectors, *(statistics or (None, None, None)))

    _, warps, stages, cut = way.cut

    def configure() -> Config:
        if way.cut.kind == "tiles":
            (_, _, ph, pw, dh, dw), (_, bp, bq, block_n, _) = geometry, cut
            tiles = blocks(n, block_n), blocks(q, bq), blocks(p, bp)
            sizes = (*tiles, c, n, p, q, batch, r, s, ph, pw, dh, dw, *y.stride())
            return Config((tiles[0] * way.tiles,), sizes, (back, kind, relu, *cut), warps, stages)
        if way.cut.kind == "narrow":
            tiles_n = blocks(out, cut[1])
            sizes = (tiles_n, pixels, c, n, out, h, w, p, q, r, s, *geometry, *strides)
            return Config((tiles_n * way.tiles,), sizes, (turned, kind, relu, *cut), warps)
        tiles_n, even = blocks(n, cut[1]), c % cut[2] == 0
        sizes = (tiles_n, g.groups, pixels, c, n, out, h, w, p, q, r, s, *geometry, *strides)
        what = (turned, kind, relu, precision, even)
        return Config((tiles_n * g.groups * way.tiles,), sizes, (*what, *cut), warps, stages)

    key = strides, geometry, g.groups, kind, relu, turned, back, way.described and way.described[2] is None, way.cut
    if way.cut.kind == "tiles":
        launch(ctx, convolve_tiles, key, (y, *ends), configure, (eps, *way.described))
    else:
        kernel = convolve_narrow if way.cut.kind == "narrow" else convolve_blocks
        launch(ctx, kernel, key, (x, weight, y, *ends), configure, (eps,))


def weight_gradient(ctx: LaunchContext, grad: Tensor, x: Tensor, like: Tensor, g: Geometry) -> Tensor:
    """Of what a convolution gave, `grad`, and its image, in float32: like `like` (O, J, R, S)."""
    (out, c, r, s), (batch, _, p, q), (_, _, h, w) = like.shape, grad.shape, x.shape
    n, taps, pixels = out // g.groups, r * s, batch * p * q
    half = x.dtype is not torch.float32
    block_n, block_c = power_of_2(n, 16, 128 if half else 32), power_of_2(c, 16, 128 if half else 32)
    block_m, warps, stages = (64, 8 if block_n * block_c >= 8192 else 4, 3) if half else (32, 4, 2)
    tiles_n, tiles_c = blocks(n, block_n), blocks(c, block_c)
    units = tiles_n * tiles_c * taps * g.groups
    splits = max(1, min(2 * multiprocessors(ctx) // units, pixels // (4 * block_m)))
    share = blocks(blocks(pixels, splits), block_m) * block_m
    parts = ctx.scratch((splits, g.groups, taps, n, c), "float32")
    strides = (*x.stride(), *grad.stride())
    geometry = (*g.stride, *g.padding, *g.dilation)

    def configure() -> Config:
        sizes = (tiles_n, tiles_c, taps, g.groups, share, pixels, c, n, h, w, p, q, s, *geometry, *strides)
        precision = "tf32" if ctx.precision == "tf32" else "ieee"
        return Config((units * splits,), sizes, (precision, block_m, block_n, block_c), warps, stages)

    launch(ctx, weight_gradient_blocks, (strides, geometry, splits), (grad, x, parts), configure)
    found = parts.sum(0) if splits > 1 else parts[0]
    return found.view(g.groups, r, s, n, c).permute(0, 3, 4, 1, 2).reshape(like.shape)
