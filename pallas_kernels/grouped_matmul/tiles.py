"""Tile sizes: what fits the memory of a chip, and what its matrix units like.

Those for TPUs are counted, not timed (`scripts/bench_kernels.py count`): static bundles of a product with 5120 x 512
bfloat16 weights, jax 0.10.2, libtpu 0.0.42.1. Below some number of rows it takes as long as loading the weights into
the matrix units.

| rows       |   32 |   64 |  128 |  256 |  512 |
|------------|------|------|------|------|------|
| v5e, v5p   | 1452 | 2562 | 4611 | 8766 |      |
| v6e        | 1217 | 1334 | 1538 | 2788 | 5331 |
| tpu7x      |  784 |  892 | 1136 | 1550 | 2358 |
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.dispatch import target
from pallas_kernels.gpu import card, power_of_two

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


class GpuRowTiles(NamedTuple):
    """Tiles of rows times weights on GPU; see `gpu.py`.

    Attributes:
        rows: rows of a block.
        cols: columns of the result.
        depth: contracted numbers of one step.
        together: blocks of rows that share a tile of columns at a time.
        num_warps: of 32 threads.
        num_stages: steps whose operands are in shared memory, or on their way there.
    """

    rows: int
    cols: int
    depth: int
    together: int
    num_warps: int
    num_stages: int


class GpuOuterTiles(NamedTuple):
    """Tiles of the weight gradients on GPU: rows per step, rows and columns of the result."""

    rows: int
    depth: int
    cols: int
    num_warps: int
    num_stages: int


GPU_FEW_ROWS = 64
"""Rows of a mean group up to which weights are all that takes time."""

# 16 blocks of 128 rows of 5120 bfloat16 are 21 MB: they stay in the L2 cache of an H100 (50 MB) while the weights pass.
_GPU_TOGETHER = 16

# Bytes of weights in one step of few rows. With four steps, and two programs on a core, enough is on its way to keep
# the memory busy while it answers: 3.35 TB/s times about 1 us is 25 KB for each core of an H100.
_GPU_STEP_BYTES = 16 << 10


def gpu_row_tiles(
    num_rows: int,
    num_groups: int,
    num_cols: int,
    depth: int,
    num_operands: tuple[int, int],
    itemsize: int,
    weight_bits: int,
    most_depth: int,
) -> GpuRowTiles:
    """Returns the tiles of rows times weights: the fastest of a dozen on an H200, with Scout's shapes.

    Args:
        num_rows: rows, whether or not a group here owns them.
        num_groups: groups that share the rows.
        num_cols: columns of the result.
        depth: contracted numbers.
        num_operands: arrays of rows and of weights that one step reads.
        itemsize: bytes of a number of the rows.
        weight_bits: bits of a number of the weights.
        most_depth: what the groups of quantised weights allow, a power of two.
    """
    if target().platform == "cpu":  # interpreted: tests have several of each
        return GpuRowTiles(16, 32, min(32, most_depth), together=3, num_warps=4, num_stages=1)
    num_x, num_weights = num_operands
    mean_group = -(-num_rows // num_groups)
    if itemsize == 4:  # a product is three, of operands that are split in registers
        rows, cols, step, num_warps = 64, 64, 32, 4
    elif mean_group > GPU_FEW_ROWS:
        # Sums of 128 x 256 numbers are half of the registers of 8 warps.
        rows, cols, step, num_warps = 128, 256 // num_weights, 64, 8
    else:
        rows, cols, step, num_warps = power_of_two(mean_group, 16), 128, 64 if weight_bits > 4 else 128, 4
        if weight_bits > 4:  # 128 columns of int4 are 64 bytes of memory in a row: with fewer it slows down
            while min(num_rows, num_groups) * num_cols // cols < card().num_cores // 2 and cols > 64:
                cols //= 2
        while weight_bits == 16 and num_weights * cols * step * 2 < _GPU_STEP_BYTES and step < 256:
            step *= 2
    cols = min(cols, power_of_two(num_cols, 16))
    step = min(step, most_depth, power_of_two(depth, 16))

    def step_bytes():
        return step * (num_x * rows * itemsize + num_weights * cols * weight_bits // 8)

    room = card().shared_bytes
    if weight_bits < 16:
        room -= num_weights * cols * step * itemsize  # decoded
    while 2 * step_bytes() > room and step > 16:
        step //= 2
    programs = 1 if rows == 128 else 2
    num_stages = min(max(room // programs // step_bytes(), 2), 4 if weight_bits > 4 else 3)
    return GpuRowTiles(rows, cols, step, _GPU_TOGETHER, num_warps, num_stages)


def gpu_outer_tiles(itemsize: int) -> GpuOuterTiles:
    """Returns the tiles of weight gradients of rows of `itemsize` bytes per number."""
    if target().platform == "cpu":
        return GpuOuterTiles(16, 32, 32, num_warps=4, num_stages=1)
    if itemsize == 4:
        return GpuOuterTiles(32, 64, 64, num_warps=4, num_stages=3)
    step_bytes = 2 * 64 * (128 + 256)
    return GpuOuterTiles(64, 128, 256, num_warps=8, num_stages=min(card().shared_bytes // step_bytes, 3))
