"""Which blocks of queries see which blocks of keys, from a few numbers per block instead of a T x S mask.

A query sees the keys of its segment whose positions lie in one interval: up to its own position (causal), within its
chunk, or all. Padding is an empty interval, or a position beyond every interval. The smallest and largest values of a
block then say whether all, some or none of its pairs are visible, in any order of positions.

Everything here takes NumPy arrays, which are computed while the program is traced, or JAX arrays.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

FULL, PARTIAL, HIDDEN = 0, 1, 2

AnyArray = Array | np.ndarray

_LEAST, _MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Queries(NamedTuple):
    """The positions `low..high` that each query sees, and its segment (None: there is only one)."""

    low: Int[AnyArray, "B T"]
    high: Int[AnyArray, "B T"]
    segment: Int[AnyArray, "B T"] | None = None


class Keys(NamedTuple):
    """The position of each key, and its segment (None: there is only one)."""

    position: Int[AnyArray, "B S"]
    segment: Int[AnyArray, "B S"] | None = None


# What pads a row to whole blocks: queries that see nothing, keys that nobody sees.
_NO_QUERY, _NO_KEY = Queries(_MOST, _LEAST, 0), Keys(_MOST, 0)


class QueryRanges(NamedTuple):
    """What the queries of a block have in common. Padding does not count, except that nothing is common with it."""

    lowest: AnyArray
    """Of the queries in the first segment, the smallest position that one of them may see."""
    highest: AnyArray
    """Of the queries in the last segment, the largest position that one of them may see."""
    common_low: AnyArray
    """Every query sees the positions of its segment from here"""
    common_high: AnyArray
    """to here."""
    first_segment: AnyArray | None = None
    last_segment: AnyArray | None = None


class KeyRanges(NamedTuple):
    """What the keys of a block have in common. Padding counts for `end` only."""

    first: AnyArray
    """Smallest position in the first segment."""
    last: AnyArray
    """Largest position in the last segment."""
    end: AnyArray
    """Largest position; beyond every interval if one of the keys is padding."""
    first_segment: AnyArray | None = None
    last_segment: AnyArray | None = None


def make_labels(
    shape: tuple[int, int, int],
    q_positions: Int[AnyArray, "B T"] | None,
    kv_positions: Int[AnyArray, "B S"] | None,
    q_segment_ids: Int[AnyArray, "B T"] | None,
    kv_segment_ids: Int[AnyArray, "B S"] | None,
    causal: bool,
    chunk_size: int | None,
) -> tuple[Queries, Keys]:
    """Returns the labels of all queries and keys, for a call of B rows, T queries and S keys.

    They are NumPy arrays where the call gives neither positions nor segments.
    """
    batch, num_queries, num_keys = shape
    given = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    xp = np if all(x is None for x in given) else jnp

    def or_default(values, default):
        return xp.broadcast_to(default, (batch, len(default))) if values is None else values.astype(xp.int32)

    q_position = or_default(q_positions, xp.arange(num_queries, dtype=xp.int32))
    position = or_default(kv_positions, xp.arange(num_keys, dtype=xp.int32))
    low, high = xp.full_like(q_position, _LEAST), xp.full_like(q_position, _MOST - 1)
    if chunk_size is not None:
        low = q_position // chunk_size * chunk_size
        high = low + (chunk_size - 1)
    if causal:
        high = q_position
    if q_segment_ids is None and kv_segment_ids is None:
        return Queries(low, high), Keys(position)
    q_segment = or_default(q_segment_ids, xp.ones(num_queries, xp.int32))
    segment = or_default(kv_segment_ids, xp.ones(num_keys, xp.int32))
    low, high = xp.where(q_segment == 0, _MOST, low), xp.where(q_segment == 0, _LEAST, high)
    return Queries(low, high, q_segment), Keys(xp.where(segment == 0, _MOST, position), segment)


def visible(queries: Queries, keys: Keys) -> Bool[AnyArray, "..."]:
    """Returns which query sees which key; the fields of the two broadcast against each other."""
    mask = (queries.low <= keys.position) & (keys.position <= queries.high)
    return mask if keys.segment is None else mask & (queries.segment == keys.segment)


def pad_labels(labels: Queries | Keys, multiple: int) -> Queries | Keys:
    """Returns the labels with padding at the end, so that whole blocks cover them."""
    padding = ((0, 0), (0, -labels[0].shape[1] % multiple))
    values = _NO_QUERY if isinstance(labels, Queries) else _NO_KEY
    return type(labels)(
        *(None if x is None else _xp(x).pad(x, padding, constant_values=v) for x, v in zip(labels, values, strict=True))
    )


def query_ranges(queries: Queries, block: int) -> QueryRanges:
    """Returns the ranges of whole blocks, each [B, blocks]."""
    low, high = _blocked(queries.low, block), _blocked(queries.high, block)
    # Padding has the interval _MOST.._LEAST: it leaves the union of the intervals alone and empties what is common.
    lowest, highest, *segments = _ends(low, high, queries.segment)
    return QueryRanges(lowest, highest, low.max(2), high.min(2), *segments)


def key_ranges(keys: Keys, block: int) -> KeyRanges:
    """Returns the ranges of whole blocks, each [B, blocks]."""
    position = _blocked(keys.position, block)
    real_position = _xp(position).where(position == _MOST, _LEAST, position)
    first, last, *segments = _ends(position, real_position, keys.segment)
    return KeyRanges(first, last, position.max(2), *segments)


def _ends(low: AnyArray, high: AnyArray, segment: AnyArray | None) -> list[AnyArray]:
    """Returns per block the smallest `low` of the first segment, the largest `high` of the last, and these segments."""
    if segment is None:
        return [low.min(2), high.max(2)]
    xp = _xp(segment)
    segment = _blocked(segment, low.shape[2])
    first_segment, last_segment = xp.where(segment == 0, _MOST, segment).min(2), segment.max(2)
    lowest = xp.where(segment == first_segment[:, :, None], low, _MOST).min(2)
    highest = xp.where(segment == last_segment[:, :, None], high, _LEAST).max(2)
    return [lowest, highest, first_segment, last_segment]


def _blocked(values: AnyArray, block: int) -> AnyArray:
    return values.reshape(values.shape[0], -1, block)


def _xp(array: AnyArray):
    return np if isinstance(array, np.ndarray) else jnp


def may_see(queries: QueryRanges, keys: KeyRanges) -> Bool[AnyArray, "..."]:
    """Returns False where no query of a block sees a key of the other; True says that some may.

    Segments and positions compare like words: where documents follow one another in ascending order of their ids, a
    block that begins behind the end of another is told from it although both hold parts of several documents.
    """
    begins_in_time, ends_in_time = keys.first <= queries.highest, keys.last >= queries.lowest
    if keys.first_segment is not None:
        begins_in_time = (keys.first_segment < queries.last_segment) | (
            (keys.first_segment == queries.last_segment) & begins_in_time
        )
        ends_in_time = (keys.last_segment > queries.first_segment) | (
            (keys.last_segment == queries.first_segment) & ends_in_time
        )
    return begins_in_time & ends_in_time


def see_all(queries: QueryRanges, keys: KeyRanges) -> Bool[AnyArray, "..."]:
    """Returns where every query of a block sees every key of the other; there `may_see` holds too."""
    full = (keys.first >= queries.common_low) & (keys.end <= queries.common_high)
    if keys.first_segment is None:
        return full
    one_segment = (queries.first_segment == queries.last_segment) & (keys.first_segment == keys.last_segment)
    return full & one_segment & (keys.first_segment == queries.first_segment)


def every_pair(queries: QueryRanges, keys: KeyRanges) -> tuple[QueryRanges, KeyRanges]:
    """Returns the ranges with axes added, so that `may_see` and `see_all` give [B, query blocks, key blocks]."""
    return (
        QueryRanges(*(None if x is None else x[:, :, None] for x in queries)),
        KeyRanges(*(None if x is None else x[:, None, :] for x in keys)),
    )
