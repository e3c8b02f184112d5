"""Routed expert matmuls: rows sorted by expert times that expert's matrix. No expert computes a row it was not given.

The groups are ragged: `group_sizes_E[e]` rows belong to expert e, in order. Groups may be empty, one group may hold
every row, and rows after the last group (padding, or rows of experts that live elsewhere) belong to nobody.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch, register
from pallas_kernels.grouped_matmul import reference, xla

register("grouped_matmul", "xla", xla.grouped_matmul)
register("grouped_matmul", "reference", reference.grouped_matmul)
register("grouped_swiglu", "xla", xla.grouped_swiglu)
register("grouped_swiglu", "reference", reference.grouped_swiglu)


def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    weights_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, " E"],
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Returns `rows_RD[r] @ weights_EDF[expert of r]` for every row.

    Differentiable in rows and weights.

    Args:
        rows_RD: rows sorted by expert, float32 or bfloat16.
        weights_EDF: one matrix per expert, in the dtype of the rows.
        group_sizes_E: number of rows of each expert; their sum is at most R. Rows after the sum give zeros.
        implementation: "auto", or a name from `dispatch.implementations("grouped_matmul")`.

    Returns:
        Array in the dtype of the rows; sums are float32 inside.

    Raises:
        ValueError: shapes or dtypes disagree, or the named implementation cannot serve the call.
    """
    _check(rows_RD, group_sizes_E, weights=weights_EDF)
    return dispatch("grouped_matmul", implementation, rows_RD, weights_EDF, group_sizes_E)


def grouped_swiglu(
    rows_RD: Float[Array, "R D"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, " E"],
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Returns `silu(rows @ gate) * (rows @ up)` with each row's own expert, in one pass over the rows.

    Arguments, result and errors are those of `grouped_matmul`; the activation is computed in float32.
    """
    _check(rows_RD, group_sizes_E, gate=gate_EDF, up=up_EDF)
    return dispatch("grouped_swiglu", implementation, rows_RD, gate_EDF, up_EDF, group_sizes_E)


def _check(rows_RD: Array, group_sizes_E: Array, **weights: Array) -> None:
    for name, weight in weights.items():
        if weight.ndim != 3 or weight.shape[:2] != (group_sizes_E.shape[0], rows_RD.shape[1]):
            raise ValueError(
                f"{name} has shape {weight.shape}; with {group_sizes_E.shape[0]} groups and rows of shape "
                f"{rows_RD.shape} it must be [{group_sizes_E.shape[0]}, {rows_RD.shape[1]}, F]"
            )
        if weight.dtype != rows_RD.dtype:
            raise ValueError(f"{name} is {weight.dtype} but rows are {rows_RD.dtype}; cast one of them")
