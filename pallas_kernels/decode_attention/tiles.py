"""How the decode kernels cut the work: slots per block, and splits of each sequence over the cores of a chip."""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels.dispatch import target
from pallas_kernels.gpu import card, power_of_two

SUBLANES, LANES = 8, 128
"""A tile of TPU memory."""

# Bytes of a block, keys and values together. Two blocks are on their way while one is computed, so a block takes longer
# to arrive than memory needs to answer (about 1 us); larger ones spread the cost of a step over more slots, which only
# a chip needs whose memory feeds it as fast as it computes. Small ones compute less in vain for short sequences.
_BLOCK_BYTES = {"TPU7x": 4 << 20}
_DEFAULT_BLOCK_BYTES = 2 << 20

# A block is at least one page. Three blocks of this size and the scores fit every chip.
MAX_BLOCK_BYTES = 8 << 20

# Chips that show two cores as one device: v4 and v5p. Splits share the blocks of every sequence evenly, also when there
# is only one, or lengths differ; the merge reads a few queries' worth of numbers.
_CORES = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2}


class Tiles(NamedTuple):
    block_slots: int
    """Slots that are read and computed together; with pages a whole number of them."""
    num_splits: int
    """Parts of each sequence, computed in parallel and merged by their log-sum-exp."""


def slot_bytes(num_kv_heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    return 2 * num_kv_heads * head_dim * dtype.itemsize


def choose_tiles(
    device_kind: str, cache_shape: tuple[int, int, int, int], dtype: jnp.dtype, page_table: Int[Array, "B P"] | None
) -> Tiles:
    """Returns the tiles for a cache [B, S, K, H] or pages [num_pages, page_size, K, H]."""
    _, slots, num_kv_heads, head_dim = cache_shape
    block_bytes = _BLOCK_BYTES.get(device_kind, _DEFAULT_BLOCK_BYTES)
    block_slots = block_bytes // slot_bytes(num_kv_heads, head_dim, dtype)
    if page_table is None:
        block_slots = min(block_slots // LANES, pl.cdiv(slots, LANES)) * LANES
    else:
        block_slots = min(max(block_slots // slots, 1), page_table.shape[1]) * slots
    return Tiles(block_slots, _CORES.get(device_kind, 1))


def num_tiles(num_slots, num_kv_heads: int):
    """Returns how many tiles of values hold a run of slots: what a DMA reads of keys, or of values."""
    return pl.cdiv(num_slots * num_kv_heads, SUBLANES)


def num_lanes(num_slots):
    """Returns how many slots' scales a DMA reads: whole lines."""
    return pl.cdiv(num_slots, LANES) * LANES


def bytes_read(
    used_slots: Iterable[int], tiles: Tiles, num_kv_heads: int, head_dim: int, dtype: jnp.dtype, page_size: int | None
) -> int:
    """Returns the bytes that the kernel reads of caches in which each sequence uses that many slots."""
    total = 0
    for used in used_slots:
        piece = page_size or tiles.block_slots
        for count in (min(piece, used - first) for first in range(0, used, piece)):
            total += 2 * num_tiles(count, num_kv_heads) * SUBLANES * head_dim * dtype.itemsize
            if dtype == jnp.int8:
                total += 2 * num_kv_heads * num_lanes(count) * 4
    return total


class GpuTiles(NamedTuple):
    """How the Triton kernel cuts the work; see `gpu.py`.

    Attributes:
        rows: queries of a kv head, of all its tokens, rounded up to a power of two.
        block_slots: slots that are read and computed together, of one page.
        num_splits: parts of each sequence, computed in parallel and merged by their log-sum-exp.
        num_warps: of 32 threads.
        num_stages: blocks that are in shared memory or on their way there; those of pages count half, because Triton
            takes a stage to load a page's number.
    """

    rows: int
    block_slots: int
    num_splits: int
    num_warps: int
    num_stages: int


def choose_gpu_tiles(
    num_sequences: int, num_slots: int, num_rows: int, page_size: int | None, itemsize: int
) -> GpuTiles:
    """Returns the tiles of the Triton kernel.

    Args:
        num_sequences: of one kv head each.
        num_slots: of each sequence.
        num_rows: queries of a kv head, of all its tokens.
        page_size: slots of a page, if there are pages.
        itemsize: bytes of a number of the queries.
    """
    rows = power_of_two(num_rows, 16)
    # 64 slots of bfloat16 keys and values are 32 KB. Two blocks are on their way while one is computed, and three
    # programs share a core: 192 KB, where 3.35 TB/s times about 1 us asks for 25 KB of each core of an H100.
    block_slots = 64 if itemsize == 2 else 32
    if target().platform == "cpu":  # interpreted: tests have several of each
        num_splits = 3
    else:
        num_splits = min(pl.cdiv(2 * card().num_cores, num_sequences), pl.cdiv(num_slots, block_slots))
    if page_size is None:
        return GpuTiles(rows, block_slots, num_splits, num_warps=4, num_stages=4)
    return GpuTiles(rows, min(block_slots, page_size & -page_size), num_splits, num_warps=4, num_stages=5)
