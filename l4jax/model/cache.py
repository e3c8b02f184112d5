"""The key/value cache: `min(chunk, max_len)` slots for layers that attend inside chunks, `max_len` for the others.

A token at document position p lives in slot p, or p modulo the number of slots in a chunked layer: there a new chunk
simply overwrites the last one, for nothing in it can be seen any more. What is visible follows from positions alone, so
stale slots need no clearing. Keys are stored rotated and normalised, values raw.
"""

from dataclasses import dataclass, replace

import jax
from jaxtyping import Array, Bool, Float, Int

from l4jax import ops
from l4jax.model.stack import Layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of the layers at one place of the cycle (C of them; 1 for a layer outside the scan)."""

    k: Float[Array, "C B S K H"]
    v: Float[Array, "C B S K H"]

    def write(self, layer, k, v, positions: Int[Array, "B T"], keep: Bool[Array, "B T"], chunk_size: int | None):
        """Returns the cache with new keys and values [B, T, K, H] of one layer; what is not to be kept goes nowhere."""
        slots = positions % self.k.shape[2]
        return LayerCache(
            k=ops.write_slots(self.k, k, layer, slots, keep, chunk_size),
            v=ops.write_slots(self.v, v, layer, slots, keep, chunk_size),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The cache of a whole model, arranged like its layers; one document a row."""

    layers: Layers
    lengths: Int[Array, "B"]
    """Tokens stored so far in each row; the next one has this position."""

    def with_rows(self, rows: Int[Array, "R"]) -> "Cache":
        """Returns the cache of some of the rows, in the order given."""
        layers = jax.tree.map(lambda x: x[:, rows], self.layers)
        return replace(self, layers=layers, lengths=self.lengths[rows])
