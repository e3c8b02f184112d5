"""Routed expert matmuls, as a specification: every expert on every row, then the row's own expert is kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _expert_of_row(num_rows: int, group_sizes_E: Int[Array, " E"]) -> Int[Array, " R"]:
    """Returns the expert that owns each row; E for the rows after the last group."""
    group_ends_E = jnp.cumsum(group_sizes_E)
    return jnp.searchsorted(group_ends_E, jnp.arange(num_rows), side="right")


def grouped_matmul(
    rows_RD: Float[Array, "R D"], weights_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"]
) -> Float[Array, "R F"]:
    owner_R = _expert_of_row(rows_RD.shape[0], group_sizes_E)
    owned_R1 = (owner_R < weights_EDF.shape[0])[:, None]
    rows_RD_f32 = jnp.where(owned_R1, rows_RD, 0).astype(jnp.float32)
    products_ERF = jnp.einsum(
        "RD,EDF->ERF", rows_RD_f32, weights_EDF.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    onehot_RE = jax.nn.one_hot(owner_R, weights_EDF.shape[0], dtype=jnp.float32)
    return jnp.einsum("RE,ERF->RF", onehot_RE, products_ERF).astype(rows_RD.dtype)


def grouped_swiglu(
    rows_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, " E"],
) -> Float[Array, "R F"]:
    rows_RD_f32 = rows_RD.astype(jnp.float32)
    gate_RF = grouped_matmul(rows_RD_f32, gate_EDF, group_sizes_E)
    up_RF = grouped_matmul(rows_RD_f32, up_EDF, group_sizes_E)
    return (jax.nn.silu(gate_RF) * up_RF).astype(rows_RD.dtype)
