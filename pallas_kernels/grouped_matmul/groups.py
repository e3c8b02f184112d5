"""Where the rows of the groups lie: what every implementation asks first."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class Groups(NamedTuple):
    """The rows `start_e[i]..end_e[i]-1` of each group whose matrix is held here."""

    start_e: Int[Array, " e"]
    end_e: Int[Array, " e"]


def local_groups(group_sizes_E: Int[Array, " E"], group_offset: int | Int[Array, ""] | None, num_local: int) -> Groups:
    """Returns the groups `group_offset..group_offset + num_local - 1` of all E."""
    offset = 0 if group_offset is None else group_offset
    end_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    start_e, end_e = (lax.dynamic_slice(a, (offset,), (num_local,)) for a in (end_E - group_sizes_E, end_E))
    return Groups(start_e.astype(jnp.int32), end_e)
