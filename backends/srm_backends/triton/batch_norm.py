"""Batch norm after a convolution in Triton: statistics joined from those of tiles, one pass that normalises, and the
gradient. Images are (pixels, channels) in tiles, whatever their memory format is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.launch import Config, blocks, launch, multiprocessors, power_of_2
from srm_core.context import LaunchContext


@triton.jit
def join_statistics(
    tile_means, tile_spreads, tile_counts, bias, mean, var, centre, rate, tiles, pixels, O, eps: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """mean, var (O,) of all pixels from those of tiles (tiles, O), of tile_counts pixels
    each; centre: the mean without the bias; rate:
    1 / sqrt(var + eps). (T. Chan, G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979.)"""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    there = o < O
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < tiles)[:, None] & there[None, :]
        count = tl.load(tile_counts + t, t < tiles, other=0)[:, None]
        total += tl.load(tile_means + t[:, None] * O + o[None, :], inside, other=0) * count
    middle = tl.sum(total, 0) / pixels
    spread = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < tiles)[:, None] & there[None, :]
        count = tl.load(tile_counts + t, t < tiles, other=0)[:, None]
        away = tl.load(tile_means + t[:, None] * O + o[None, :], inside, other=0) - middle[None, :]
        of_tile = tl.load(tile_spreads + t[:, None] * O + o[None, :], inside, other=0)
        spread += tl.where(inside, of_tile + count * away * away, 0)
    variance = tl.sum(spread, 0) / pixels
    shown = middle
    if bias is not None:
        b = tl.load(bias + o, there, other=0).to(tl.float32)
        shown = middle + b
        # Neither y nor the variance sees a bias, but where it is no number.
        variance += b - b
    tl.store(mean + o, shown.to(mean.dtype.element_ty), there)
    tl.store(var + o, variance.to(var.dtype.element_ty), there)
    tl.store(centre + o, middle, there)
    tl.store(rate + o, 1 / tl.sqrt_rn(variance + eps), there)


@triton.jit
def added(tile):
    """The sums of the columns, in float64: where a sum nearly cancels, each rounding shows."""
    return tl.sum(tile.to(tl.float64), 0).to(tl.float32)


@triton.jit
def _places(tile, o, pixels, PQ, ib, io, ip, iq, Q, BLOCK_M: tl.constexpr):
    """(offsets of a tile of pixels and channels o, which pixels are there)."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rest, b = m % PQ, (m // PQ).to(tl.int64)
    at = b * ib + (rest // Q).to(tl.int64) * ip + (rest % Q).to(tl.int64) * iq
    return at[:, None] + (o.to(tl.int64) * io)[None, :], m < pixels


@triton.jit
def _vector(pointer, o, there, DEFAULT: tl.constexpr):
    """A vector of channels as (1, channels); DEFAULT where there is none."""
    found = tl.full(o.shape, DEFAULT, tl.float32)
    if pointer is not None:
        found = tl.load(pointer + o, there, other=0).to(tl.float32)
    return found[None, :]


@triton.jit
def normalise(
    convolution, y, centre, rate, gamma, beta, tiles_o, pixels, PQ, Q, O, cb, co, cp, cq, yb, yo, yp, yq,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y = act((convolution - centre) * rate * gamma + beta)."""
    tile, of_o = tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o
    o = of_o * BLOCK_O + tl.arange(0, BLOCK_O)
    there = o < O
    at, inside = _places(tile, o, pixels, PQ, cb, co, cp, cq, Q, BLOCK_M)
    inside = inside[:, None] & there[None, :]
    c = tl.load(convolution + at, inside, other=0).to(tl.float32)
    normal = (c - _vector(centre, o, there, 0)) * _vector(rate, o, there, 1)
    z = normal * _vector(gamma, o, there, 1) + _vector(beta, o, there, 0)
    if RELU:
        z = tl.where(z < 0, 0, z)
    at, _ = _places(tile, o, pixels, PQ, yb, yo, yp, yq, Q, BLOCK_M)
    tl.store(y + at, z.to(y.dtype.element_ty), inside)


@triton.jit
def _through(
    grad, convolution, centre, rate, gamma, beta, at_g, at_c, inside, o, there, RELU: tl.constexpr
):  # fmt: skip
    """(the gradient before the activation, the normalised convolution) of a tile."""
    d_z = tl.load(grad + at_g, inside, other=0).to(tl.float32)
    c = tl.load(convolution + at_c, inside, other=0).to(tl.float32)
    normal = tl.where(inside, (c - _vector(centre, o, there, 0)) * _vector(rate, o, there, 1), 0)
    if RELU:
        z = normal * _vector(gamma, o, there, 1) + _vector(beta, o, there, 0)
        d_z = tl.where(z <= 0, 0, d_z)
    return d_z, normal


@triton.jit
def gradient_sums(
    grad, convolution, centre, rate, gamma, beta, sums, normal_sums, tiles_o, share, pixels, PQ, Q, O,
    gb, go, gp, gq, cb, co, cp, cq, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """sums, normal_sums (parts, O): of the gradient before the activation, and of it times the normalised
    convolution; each of `share` tiles."""
    part, of_o = tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o
    o = of_o * BLOCK_O + tl.arange(0, BLOCK_O)
    there = o < O
    first = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for i in range(share):
        at_g, inside = _places(part * share + i, o, pixels, PQ, gb, go, gp, gq, Q, BLOCK_M)
        at_c, _ = _places(part * share + i, o, pixels, PQ, cb, co, cp, cq, Q, BLOCK_M)
        inside = inside[:, None] & there[None, :]
        d_z, normal = _through(grad, convolution, centre, rate, gamma, beta, at_g, at_c, inside, o, there, RELU)
        first += d_z
        second += d_z * normal
    tl.store(sums + part * O + o, added(first), there)
    tl.store(normal_sums + part * O + o, added(second), there)


@triton.jit
def gradient_of_convolution(
    grad, convolution, centre, rate, gamma, beta, sums, normal_sums, d_mean, d_var, d_convolution,
    tiles_o, pixels, PQ, Q, O, gb, go, gp, gq, cb, co, cp, cq,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """gamma * rate * (dz - (sum(dz) + n * sum(dz * n)) / N) + (dmean + 2 * (c - mean) * dvar) / N, in the places of
    the convolution. sums, normal_sums (O,): of all pixels."""
    tile, of_o = tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o
    o = of_o * BLOCK_O + tl.arange(0, BLOCK_O)
    there = o < O
    at_g, inside = _places(tile, o, pixels, PQ, gb, go, gp, gq, Q, BLOCK_M)
    at_c, _ = _places(tile, o, pixels, PQ, cb, co, cp, cq, Q, BLOCK_M)
    inside = inside[:, None] & there[None, :]
    d_z, normal = _through(grad, convolution, centre, rate, gamma, beta, at_g, at_c, inside, o, there, RELU)
    speed = _vector(rate, o, there, 1)
    mean = (_vector(sums, o, there, 0) + normal * _vector(normal_sums, o, there, 0)) / pixels
    d_c = _vector(gamma, o, there, 1) * speed * (d_z - mean)
    d_c += (_vector(d_mean, o, there, 0) + 2 * normal / speed * _vector(d_var, o, there, 0)) / pixels
    tl.store(d_convolution + at_c, d_c.to(d_convolution.dtype.element_ty), inside)


@triton.jit
def line_gradient(
    grad, y, d_z, sums, tiles_o, share, pixels, PQ, Q, O, gb, go, gp, gq, yb, yo, yp, yq,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """d_z, in the places of y: the gradient before the activation; sums (parts, O) of it, each of `share` tiles."""
    part, of_o = tl.program_id(0) // tiles_o, tl.program_id(0) % tiles_o
    o = of_o * BLOCK_O + tl.arange(0, BLOCK_O)
    there = o < O
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for i in range(share):
        at_g, inside = _places(part * share + i, o, pixels, PQ, gb, go, gp, gq, Q, BLOCK_M)
        at_y, _ = _places(part * share + i, o, pixels, PQ, yb, yo, yp, yq, Q, BLOCK_M)
        inside = inside[:, None] & there[None, :]
        found = tl.load(grad + at_g, inside, other=0).to(tl.float32)
        if RELU:
            z = tl.load(y + at_y, inside, other=0).to(tl.float32)
            found = tl.where(z <= 0, 0, found)
        total += found
        tl.store(d_z + at_y, found.to(d_z.dtype.element_ty), inside)
    tl.store(sums + part * O + o, added(total), there)


def tile_of(image: Tensor) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_O): of 4096 numbers, along what is dense in memory."""
    channels = image.shape[1]
    if image.stride(1) == 1 and channels > 1:
        block_o = power_of_2(channels, 16, 256)
        return 4096 // block_o, block_o
    return 256, power_of_2(channels, 1, 16)


def parts_of(ctx: LaunchContext, image: Tensor) -> tuple[int, int, int]:
    """(parts, tiles that each has, tiles of channels): how sums over pixels are shared among programs."""
    block_m, block_o = tile_of(image)
    batch, channels, height, width = image.shape
    tiles, tiles_o = blocks(batch * height * width, block_m), blocks(channels, block_o)
    parts = max(1, min(tiles, 4 * multiprocessors(ctx) // max(1, tiles_o)))
    share = max(1, blocks(tiles, parts))
    return blocks(tiles, share), share, tiles_o


def extent(image: Tensor) -> tuple[int, int, int, int]:
    """(pixels, of an image, of a row, channels)."""
    batch, channels, height, width = image.shape
    return batch * height * width, height * width, width, channels


def over_tiles(
    ctx: LaunchContext, kernel: object, tensors: tuple[Tensor | None, ...], *images: Tensor, relu: bool
) -> None:
    """Launch a kernel of one program a tile: kernel(*tensors, tiles_o, *extent, *strides of images, RELU, tile)."""
    strides = tuple(n for image in images for n in image.stride())

    def configure() -> Config:
        block_m, block_o = tile_of(images[-1])
        size = extent(images[-1])
        tiles_o = blocks(size[3], block_o)
        grid = (blocks(size[0], block_m) * tiles_o,)
        return Config(grid, (tiles_o, *size, *strides), (relu, block_m, block_o), 8)

    launch(ctx, kernel, (strides, relu), tensors, configure)


def over_parts(
    ctx: LaunchContext, kernel: object, tensors: tuple[Tensor | None, ...], *images: Tensor, relu: bool
) -> None:
    """As `over_tiles`, for a kernel of which a program has several tiles, as `parts_of` says."""
    strides = tuple(n for image in images for n in image.stride())

    def configure() -> Config:
        parts, share, tiles_o = parts_of(ctx, images[-1])
        sizes = (tiles_o, share, *extent(images[-1]), *strides)
        return Config((parts * tiles_o,), sizes, (relu, *tile_of(images[-1])), 8)

    launch(ctx, kernel, (strides, relu), tensors, configure)
