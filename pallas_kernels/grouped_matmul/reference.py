"""Routed expert matmuls, as a specification: every expert on every row, then the row's own expert is kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized import QuantizedArray


def _local_expert_of_row(
    num_rows: int, group_sizes_E: Int[Array, " E"], group_offset: int | Int[Array, ""] | None
) -> Int[Array, " R"]:
    """Returns the expert that owns each row, counted from the first one held here: others are below 0 or too large."""
    group_ends_E = jnp.cumsum(group_sizes_E)
    owner_R = jnp.searchsorted(group_ends_E, jnp.arange(num_rows), side="right")
    return owner_R if group_offset is None else owner_R - group_offset


def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    weights_EDF: Float[Array, "e D F"] | QuantizedArray,
    group_sizes_E: Int[Array, " E"],
    group_offset: int | Int[Array, ""] | None = None,
) -> Float[Array, "R F"]:
    if isinstance(weights_EDF, QuantizedArray):
        weights_EDF = jax.lax.stop_gradient(weights_EDF.dequantize(jnp.float32))
    owner_R = _local_expert_of_row(rows_RD.shape[0], group_sizes_E, group_offset)
    owned_R1 = ((owner_R >= 0) & (owner_R < weights_EDF.shape[0]))[:, None]
    rows_RD_f32 = jnp.where(owned_R1, rows_RD, 0).astype(jnp.float32)
    products_ERF = jnp.einsum(
        "RD,EDF->ERF", rows_RD_f32, weights_EDF.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    onehot_RE = jax.nn.one_hot(owner_R, weights_EDF.shape[0], dtype=jnp.float32)
    out_RF = jnp.einsum("RE,ERF->RF", onehot_RE, products_ERF).astype(rows_RD.dtype)
    return jnp.where(owned_R1, out_RF, 0)  # not only for the value: gradients of other rows may be NaN


def grouped_swiglu(
    rows_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "e D F"] | QuantizedArray,
    up_EDF: Float[Array, "e D F"] | QuantizedArray,
    group_sizes_E: Int[Array, " E"],
    group_offset: int | Int[Array, ""] | None = None,
) -> Float[Array, "R F"]:
    rows_RD_f32 = rows_RD.astype(jnp.float32)
    gate_RF = grouped_matmul(rows_RD_f32, gate_EDF, group_sizes_E, group_offset)
    up_RF = grouped_matmul(rows_RD_f32, up_EDF, group_sizes_E, group_offset)
    return (jax.nn.silu(gate_RF) * up_RF).astype(rows_RD.dtype)
