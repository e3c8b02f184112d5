"""Decode attention of Scout's shape: ours, and jax's paged_attention.

Bundles are those of the loop that reads and computes a block of slots, times the blocks of one core.
"""

from collections.abc import Callable

import jax.numpy as jnp

from kernels.cases import NUM_CORES, Case, Count, Program, array, device_kind
from kernels.dumps import Kernel
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.tiles import bytes_read, choose_tiles
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.shapes import TEXT_SHAPES

SCOUT = TEXT_SHAPES["scout"]
N, K, H = SCOUT.num_heads, SCOUT.num_kv_heads, SCOUT.head_dim
PEER_PAGE = 128
"""Slots of a page of paged_attention, where a case of ours has none."""


def _flops(slots: int, num_queries: int, num_heads: int = N) -> int:
    return 4 * slots * num_queries * num_heads * H


def _ideal_bytes(slots: int, dtype: str) -> int:
    return slots * K * 2 * (H + 4 if dtype == "int8" else 2 * H)


def _skipped(kernel: Kernel, loop: range) -> list[int]:
    """Returns the bundles that branches of a loop may leave out, largest first."""
    return sorted((len(skip) for skip in kernel.skips if skip.start in loop), reverse=True)


def ours(
    batch: int, used: int, slots: int, num_queries=1, dtype="bfloat16", page_size=None
) -> Callable[[str], Program]:
    def make(chip: str) -> Program:
        rows = (batch * slots // (page_size or slots), page_size or slots, K)
        cache = array(*rows, H, dtype=dtype)
        if dtype == "int8":
            cache = QuantizedArray(cache, array(*rows, 1, dtype=jnp.float32))
        table = array(batch, slots // page_size, dtype=jnp.int32) if page_size else None
        tiles = choose_tiles(device_kind(chip), (*rows, H), jnp.dtype(dtype), table)

        def function(q, k, v, lengths, table):
            return decode_attention(q, k, v, lengths, page_table=table, implementation="pallas")

        def count(kernel: Kernel) -> Count:
            *_, inner, outer = sorted(kernel.loops, key=len)
            loop = inner if batch > 1 else outer  # around it is the loop over the grid, if that has several steps
            bundles, skipped = len(loop), _skipped(kernel, loop)
            if dtype != "int8":
                bundles -= skipped[0]  # clears the end of the last block
            if page_size:  # the loop that starts the DMAs of a block's pages
                copies = max(len(other) for other in kernel.loops if other.start in loop and other != loop)
                bundles += copies * (tiles.block_slots // page_size - 1)
            blocks = batch * -(-used // tiles.block_slots)
            heads_together = min(4 // jnp.dtype(dtype).itemsize, K)  # of which each query needs one
            return Count(
                bundles * blocks // tiles.num_splits,
                bytes_read([used] * batch, tiles, K, H, jnp.dtype(dtype), page_size),
                _ideal_bytes(batch * used, dtype),
                heads_together * _flops(blocks * tiles.block_slots, num_queries),
                _flops(batch * used, num_queries),
            )

        q, lengths = array(batch, num_queries, N, H), array(batch, dtype=jnp.int32)
        return Program(function, [q, cache, cache, lengths, table], ("decode_attention",), count)

    return make


def paged(batch: int, used: int, slots: int, block_slots: int, page_size: int = PEER_PAGE) -> Callable[[str], Program]:
    """A block is of one kv head."""

    def make(chip: str) -> Program:
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

        pages_per_row = slots // page_size
        pages = array(K, batch * pages_per_row, page_size, H)

        def function(q, k, v, lengths, table):
            megacore = "kv_head" if NUM_CORES[chip] > 1 else None
            return paged_attention(
                q, k, v, lengths, table, pages_per_compute_block=block_slots // page_size, megacore_mode=megacore
            )

        def count(kernel: Kernel) -> Count:
            loop = sorted(kernel.loops, key=len)[-2]  # around it is the loop over the grid
            skipped = _skipped(kernel, loop)
            # The third starts the very first block; the larger two run in each step.
            bundles = len(loop) - (skipped[2] if len(skipped) > 2 else 0)
            blocks = batch * K * -(-used // block_slots)
            return Count(
                bundles * blocks // NUM_CORES[chip],
                blocks * block_slots * H * 2 * 2,
                _ideal_bytes(batch * used, "bfloat16"),
                _flops(blocks * block_slots, 1, N // K),
                _flops(batch * used, 1),
            )

        integers = array(batch, dtype=jnp.int32), array(batch, pages_per_row, dtype=jnp.int32)
        return Program(function, [array(batch, N, H), pages, pages, *integers], ("paged_attention",), count)

    return make


def _case(words: str, batch: int, used: int, slots: int, page_size: int | None = None, **options) -> Case:
    programs = {"ours": ours(batch, used, slots, page_size=page_size, **options)}
    if not options:
        for block_slots in (512, 2048):
            program = paged(batch, used, slots, block_slots, page_size or PEER_PAGE)
            programs[f"paged, {block_slots} slots"] = program
    return Case("decode_attention", f"{batch} x {used} slots{words}, {N} / {K} heads of {H}", programs)


CASES = {
    "decode-4k": _case(" of 8192", 64, 4096, 8192),
    "decode-8k": _case("", 64, 8192, 8192),
    "decode-1m": _case("", 1, 1 << 20, 1 << 20),
    "decode-pages-64": _case(", pages of 64", 64, 8192, 8192, page_size=64),
    "decode-pages-128": _case(", pages of 128", 64, 8192, 8192, page_size=128),
    "decode-8k-int8": _case(", int8", 64, 8192, 8192, dtype="int8"),
    "decode-8k-4-drafts": _case(", 4 new tokens", 64, 8192, 8192, num_queries=4),
    "decode-8k-8-drafts": _case(", 8 new tokens", 64, 8192, 8192, num_queries=8),
}
