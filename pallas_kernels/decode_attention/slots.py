"""Which slots of a cache the newest queries see, as numbers: always a run of slots from the first one on."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def newest_slot(
    lengths_B: Int[Array, "*B"], chunk_size: int | None, kv_offset: Int[Array, ""] | Int[Array, "*B"]
) -> Int[Array, "*B"]:
    """Returns the last slot that each row's newest query sees; negative for none, maybe past the end of the cache.

    A query t tokens older sees t slots less. All rows or, in a kernel, one of them.
    """
    newest_B = lengths_B - 1
    return newest_B - kv_offset if chunk_size is None else jnp.where(newest_B < 0, -1, newest_B % chunk_size)
