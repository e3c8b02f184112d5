"""The order in which the TPU kernels visit pairs of blocks, as a list in scalar memory.

Only pairs in which some query may see some key are in the list, so hidden blocks are neither loaded nor computed, and
the grid is as long as the list. It is sorted by row of the batch, query block, key block: a query block stays in fast
memory while its key blocks pass by.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention.blocks import AnyArray, Keys, Queries, every_pair, key_ranges, may_see, query_ranges
from pallas_kernels.attention.tiles import Tiles

MAX_VISITS = 2**17
"""Numbers in a list: half of the scalar memory, 1 MiB on every chip. The ranges of the tiles lie there too."""

NO_VISIT = np.iinfo(np.int32).max


class Plan(NamedTuple):
    """What a kernel knows about its blocks when it is compiled.

    A visit is one int32, composed of the row of the batch, the query block, whether key gradients are stored, and the
    key block.
    """

    tiles: Tiles
    num_q_blocks: int
    num_kv_blocks: int

    @property
    def q_tiles(self) -> int:
        """Tiles in a query block."""
        return self.tiles.q_block // self.tiles.q_tile

    @property
    def kv_tiles(self) -> int:
        """Tiles in a key block."""
        return self.tiles.kv_block // self.tiles.kv_tile

    @property
    def _kv_bits(self) -> int:
        return (self.num_kv_blocks - 1).bit_length()

    @property
    def _q_bits(self) -> int:
        return (self.num_q_blocks - 1).bit_length()

    def compose(self, batch, q_index, stores, kv_index):
        return ((batch << self._q_bits | q_index) << 1 | stores) << self._kv_bits | kv_index

    def row(self, visit):
        """Returns a number that is the same as long as the query block stays."""
        return visit >> self._kv_bits + 1

    def batch(self, visit):
        return self.row(visit) >> self._q_bits

    def q_index(self, visit):
        return self.row(visit) & (1 << self._q_bits) - 1

    def stores(self, visit):
        """Returns 1 for a visit that stores the gradients of a key block and computes nothing, else 0."""
        return visit >> self._kv_bits & 1

    def kv_index(self, visit):
        return visit & (1 << self._kv_bits) - 1

    def kv_to_load(self, visit):
        """Returns the key block in fast memory; it stays while gradients are stored."""
        return self.kv_index(visit) * (1 - self.stores(visit)) + (self.num_kv_blocks - 1) * self.stores(visit)

    def kv_to_store(self, visit):
        """Returns the key block whose gradients are in the output buffer; the first one, until they are stored."""
        return self.kv_index(visit) * self.stores(visit)


def list_visits(
    plan: Plan, queries: Queries, keys: Keys, every_query: bool, store_keys: bool
) -> tuple[AnyArray, int | Array]:
    """Returns the visits in order, filled up with NO_VISIT (at least one), and how many they are.

    Args:
        every_query: whether a query block that sees nothing is visited too, because it has to be written.
        store_keys: whether every key block is visited once more at the end of a row of the batch, to be stored.
    """
    tiles = plan.tiles
    visited = may_see(*every_pair(query_ranges(queries, tiles.q_block), key_ranges(keys, tiles.kv_block)))
    xp = np if isinstance(visited, np.ndarray) else jnp
    batch, q_index, kv_index = xp.arange(visited.shape[0]), xp.arange(plan.num_q_blocks), xp.arange(plan.num_kv_blocks)
    some = visited.any(2)
    if every_query:
        # It stays at the last key block of the query block before, which needs no loading.
        before = xp.maximum.accumulate(xp.where(some, q_index, 0), 1)
        last_kv = xp.take_along_axis((visited * kv_index).max(2), before, 1)
        visited = visited | ~some[:, :, None] & (kv_index == last_kv[:, :, None])
    visits = plan.compose(batch[:, None, None], q_index[:, None], 0, kv_index)
    visits = xp.where(visited, visits, NO_VISIT).reshape(-1)
    count = visited.sum()
    if store_keys:
        last_q = xp.where(visited.any(2), q_index, 0).max(1)
        stores = plan.compose(batch[:, None], last_q[:, None], 1, kv_index).reshape(-1)
        visits, count = xp.append(visits, stores), count + stores.size
    visits = xp.append(xp.sort(visits), NO_VISIT).astype(xp.int32)
    return visits, int(count) if xp is np else count
