"""Tile sizes of the TPU kernels: what fits a chip's memory, and what its matrix units like.

Counted, not timed (`scripts/bench_kernels.py count`): static bundles of a product with 5120 x 512 bfloat16 weights, jax
0.10.2, libtpu 0.0.42.1. Below some number of rows it takes as long as loading the weights into the matrix units.

| rows       |   32 |   64 |  128 |  256 |  512 |
|------------|------|------|------|------|------|
| v5e, v5p   | 1452 | 2562 | 4611 | 8766 |      |
| v6e        | 1217 | 1334 | 1538 | 2788 | 5331 |
| tpu7x      |  784 |  892 | 1136 | 1550 | 2358 |
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.dispatch import target

ALIGNMENT = 16
"""Rows of a packed bfloat16 register: rows are read and written at multiples of it."""


class Chip(NamedTuple):
    """What one chip is given.

    Attributes:
        vmem_bytes: fast memory that a kernel may use, of one core; the compiler keeps its own scratch there too.
        num_cores: cores that share a device and split the columns.
        big: rows of a product at full speed.
        small: rows of the product that ends a group; a divisor of `big`.
        cols: columns of the result that one step computes.
        strip: most rows that stay in fast memory.
        outer: most rows and columns of a tile of a weight gradient.
    """

    vmem_bytes: int
    num_cores: int
    big: int
    small: int
    cols: int
    strip: int
    outer: int


_MIB = 1 << 20
_CHIPS = {
    "TPU v5 lite": Chip(112 * _MIB, 1, big=128, small=64, cols=512, strip=2048, outer=2560),
    "TPU v5": Chip(60 * _MIB, 2, big=128, small=64, cols=512, strip=2048, outer=2048),
    "TPU v6 lite": Chip(112 * _MIB, 1, big=256, small=128, cols=512, strip=2048, outer=2560),
    "TPU7x": Chip(60 * _MIB, 1, big=512, small=256, cols=512, strip=2048, outer=2048),
    # The interpreter: tiles so small that tests have several of each, and two cores.
    "cpu": Chip(64 * _MIB, 2, big=32, small=16, cols=128, strip=64, outer=128),
}
_UNKNOWN = Chip(12 * _MIB, 1, big=128, small=64, cols=256, strip=512, outer=512)

_FEW_ROWS = (64, 32)
"""`big` and `small` where the mean group has at most 32 rows: weights are all that takes time."""

_WORTHWHILE_STRIP = 512
"""Rows that should share one reading of the weights, at the price of narrower columns: above the chips' ratio of
multiplications to bytes (166 to 560)."""


class RowTiles(NamedTuple):
    """Tiles of rows times weights; see `tpu.py`."""

    strip: int
    big: int
    small: int
    cols: int


class OuterTiles(NamedTuple):
    """Tiles of the weight gradients: rows per step, rows per product, rows and columns of the result."""

    strip: int
    big: int
    depth: int
    cols: int


def chip() -> Chip:
    return _CHIPS.get(target().device_kind, _UNKNOWN)


def row_tiles(
    num_rows: int,
    num_groups: int,
    num_cols: int,
    row_bytes: int,
    out_bytes: int,
    column_bytes: int,
    fixed_bytes: int,
) -> RowTiles | None:
    """Returns the tiles, or None when nothing fits.

    Args:
        num_rows: rows, whether or not a group here owns them.
        num_groups: groups that share the rows.
        num_cols: columns of the result.
        row_bytes: bytes of a row of all left operands.
        out_bytes: bytes of one number of all results.
        column_bytes: bytes of one column of all weights: buffers and decoded.
        fixed_bytes: bytes of what else stays in fast memory.
    """
    limits = chip()
    room = limits.vmem_bytes * 7 // 8 - fixed_bytes  # the rest is for the compiler: sums that leave the registers
    full_speed = _FEW_ROWS if num_rows <= 32 * num_groups else (limits.big, limits.small)
    best = None
    for big, small in dict.fromkeys((full_speed, _FEW_ROWS)):
        for cols in (limits.cols, limits.cols // 2, limits.cols // 4):
            cols = num_cols if num_cols < 128 else max(min(cols, round_down(num_cols, 128)), 128)
            strip = (room - column_bytes * cols) // (2 * (row_bytes + out_bytes * cols))
            strip = min(round_down(strip, small), limits.strip)
            if strip >= small and (best is None or strip > best.strip):
                best = RowTiles(strip, min(big, strip), small, cols)
            if best is not None and best.strip >= min(_WORTHWHILE_STRIP, num_rows):
                break
        if best is not None:
            break
    if best is None or num_rows > best.strip:
        return best
    strip = round_up(num_rows, best.small)
    return best._replace(strip=strip, big=min(best.big, strip))


def outer_tiles(num_rows: int, num_groups: int, depth: int, num_cols: int, itemsize: int) -> OuterTiles:
    """Returns the tiles of weight gradients [depth, num_cols] of rows of `itemsize` bytes per number."""
    limits = chip()
    big, _ = _FEW_ROWS if num_rows <= 32 * num_groups else (limits.big, limits.small)
    most = limits.outer * 2 // itemsize
    strip = min(2 * big, round_up(num_rows, ALIGNMENT))
    return OuterTiles(strip, min(big, strip), _tile(depth, most), _tile(num_cols, most))


def _tile(size: int, most: int) -> int:
    """Returns the largest tile of at most `most` that divides `size`; `most` if none of at least half of that does."""
    if size <= most:
        return size
    return next((tile for tile in range(most, most // 2, -128) if size % tile == 0), most)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def round_down(number: int, step: int) -> int:
    return number // step * step


def bits(dtype: jnp.dtype) -> int:
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
