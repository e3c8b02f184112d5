"""The key/value cache: `min(chunk, max_len)` slots for layers that attend inside chunks, `max_len` for the others.

A token at document position p lives in slot p, or p modulo the number of slots in a chunked layer: there a new chunk
simply overwrites the last one, for nothing in it can be seen any more. What is visible follows from positions alone, so
stale slots need no clearing. Keys are stored rotated and normalised, values raw.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l4jax.model.stack import Layers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of the layers at one place of the cycle (C of them; 1 for a layer outside the scan)."""

    k: Float[Array, "C B S K H"]
    v: Float[Array, "C B S K H"]

    def write(self, index, k, v, positions: Int[Array, "B T"], keep: Bool[Array, "B T"]) -> "LayerCache":
        """Stores new keys and values [B, T, K, H] of layer `index`; tokens that are not to be kept go nowhere."""
        num_slots = self.k.shape[2]
        slots = jnp.where(keep, positions % num_slots, num_slots)
        rows = jnp.arange(k.shape[0])[:, None]
        return LayerCache(
            k=self.k.at[index, rows, slots].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[index, rows, slots].set(v.astype(self.v.dtype), mode="drop"),
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


def cached_positions(
    lengths: Int[Array, "B"], num_slots: int, chunk_size: int | None
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Returns the position that each slot holds and 1 where the next token of the row can still see it, else 0."""
    start = jnp.zeros_like(lengths) if chunk_size is None else lengths // chunk_size * chunk_size
    positions = start[:, None] + jnp.arange(num_slots, dtype=lengths.dtype)
    return positions, (positions < lengths[:, None]).astype(jnp.int32)
