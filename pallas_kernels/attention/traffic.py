"""What a call of the TPU kernels visits, computes and moves: counted from its grid and block shapes, nothing runs."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.blocks import (
    AnyArray,
    Keys,
    Queries,
    every_pair,
    key_ranges,
    make_labels,
    may_see,
    pad_labels,
    query_ranges,
    see_all,
)
from pallas_kernels.attention.tiles import LANES, Tiles
from pallas_kernels.attention.visits import Plan, list_visits


class Traffic(NamedTuple):
    """Counts of one call.

    Attributes:
        visits: steps of the grid, over all blocks of heads.
        rows: stays of a query block in fast memory, over all blocks of heads.
        full_tiles: tiles of scores computed without a mask, for each head.
        partial_tiles: tiles of scores computed with a mask, for each head.
        bytes_read: from the chip's memory to fast memory, except labels and visits (some bytes a token).
        bytes_written: from fast memory to the chip's memory.
    """

    visits: int
    rows: int
    full_tiles: int
    partial_tiles: int
    bytes_read: int
    bytes_written: int


class Call(NamedTuple):
    """Shape and mask of a call, in the letters and names of `attention`; labels are NumPy arrays or None."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    itemsize: int
    causal: bool = True
    chunk_size: int | None = None
    q_positions: np.ndarray | None = None
    kv_positions: np.ndarray | None = None
    q_segment_ids: np.ndarray | None = None
    kv_segment_ids: np.ndarray | None = None

    def labels(self) -> tuple[Queries, Keys]:
        queries, keys = make_labels((self.B, self.T, self.S), *self[9:], self.causal, self.chunk_size)
        return Queries(*_to_numpy(queries)), Keys(*_to_numpy(keys))

    def bytes(self, tokens: int, heads: int, itemsize: int | None = None) -> int:
        """Returns the bytes of so many tokens; memory is tiled, so a narrow head is stored and moved 128 wide."""
        return tokens * heads * -(-self.H // LANES) * LANES * (itemsize or self.itemsize)


def _to_numpy(labels):
    return (None if x is None else np.asarray(x) for x in labels)


class _Counts(NamedTuple):
    visits: int
    q_loads: int
    kv_loads: int
    full: int
    partial: int


def _count(tiles: Tiles, queries: Queries, keys: Keys, **visit_options: bool) -> _Counts:
    queries, keys = pad_labels(queries, tiles.q_block), pad_labels(keys, tiles.kv_block)
    plan = Plan(tiles, queries.low.shape[1] // tiles.q_block, keys.position.shape[1] // tiles.kv_block)
    visits, count = list_visits(plan, queries, keys, **visit_options)
    visits = visits[:count]
    ranges = every_pair(query_ranges(queries, tiles.q_tile), key_ranges(keys, tiles.kv_tile))
    full = see_all(*ranges)
    kv_block = plan.batch(visits) * plan.num_kv_blocks + plan.kv_to_load(visits)
    partial = may_see(*ranges) & ~full
    return _Counts(count, _changes(plan.row(visits)), _changes(kv_block), int(full.sum()), int(partial.sum()))


def _changes(index: AnyArray) -> int:
    """Returns how often a block is loaded: whenever its index is not that of the step before."""
    return 1 + int((index[1:] != index[:-1]).sum())


def forward_traffic(call: Call, tiles: Tiles) -> Traffic:
    """Returns the counts of the forward kernel."""
    counts = _count(tiles, *call.labels(), every_query=True, store_keys=False)
    queries, keys = counts.q_loads * tiles.q_block, counts.kv_loads * tiles.kv_block
    return _traffic(
        call,
        tiles,
        counts,
        bytes_read=call.bytes(queries, call.N) + 2 * call.bytes(keys, call.K),
        bytes_written=call.bytes(queries, call.N) + 4 * queries * call.N,
    )


def backward_traffic(call: Call, tiles: Tiles, keys_per_pass: int) -> Traffic:
    """Returns the counts of the backward kernel, summed over its passes."""
    queries, keys = call.labels()
    several = keys_per_pass < call.S
    total = Traffic(0, 0, 0, 0, 0, 0)
    for start in range(0, call.S, keys_per_pass):
        part = Keys(*(None if x is None else x[:, start : start + keys_per_pass] for x in keys))
        counts = _count(tiles, queries, part, every_query=not several, store_keys=True)
        q_tokens, kv_tokens = counts.q_loads * tiles.q_block, counts.kv_loads * tiles.kv_block
        gradient = call.bytes(q_tokens, call.N, 4 if several else None)
        one_pass = _traffic(
            call,
            tiles,
            counts,
            bytes_read=2 * (call.bytes(q_tokens, call.N) + call.bytes(kv_tokens, call.K) + 4 * q_tokens * call.N)
            + (gradient if several else 0),
            bytes_written=gradient + 2 * call.bytes(call.B * part.position.shape[1], call.K),
        )
        total = Traffic(*(a + b for a, b in zip(total, one_pass, strict=True)))
    return total


def _traffic(call: Call, tiles: Tiles, counts: _Counts, bytes_read: int, bytes_written: int) -> Traffic:
    programs = call.K // tiles.kv_heads
    return Traffic(
        counts.visits * programs, counts.q_loads * programs, counts.full, counts.partial, bytes_read, bytes_written
    )
