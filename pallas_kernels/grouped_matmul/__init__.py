"""Routed expert matmuls: rows sorted by expert times that expert's matrix. No expert computes a row it was not given.

The groups are ragged: `group_sizes_E[e]` rows belong to expert e, in order. Groups may be empty, one group may hold
every row, and rows after the last group (padding) belong to nobody. Where experts are spread over devices, a device
passes the sizes of all groups, the matrices it holds and the number of the first of them: rows of the other groups
are nobody's here.
"""

import functools

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch, register
from pallas_kernels.grouped_matmul import reference, tpu, xla
from pallas_kernels.quantized import QuantizedArray

for _op in ("grouped_matmul", "grouped_swiglu"):
    register(_op, "pallas", getattr(tpu, _op), tpu.refuse)
    register(_op, "xla", getattr(xla, _op))
    register(_op, "interpret", functools.partial(getattr(tpu, _op), interpret=True), tpu.refuse_interpreted)
    register(_op, "reference", getattr(reference, _op))


def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    weights_eDF: Float[Array, "e D F"] | QuantizedArray,
    group_sizes_E: Int[Array, " E"],
    group_offset: int | Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Returns `rows_RD[r] @ weights_eDF[expert of r]` for every row.

    Differentiable in rows and weights; quantised weights are constants, gradients to the rows pass through them.

    Args:
        rows_RD: rows sorted by expert, float32 or bfloat16.
        weights_eDF: one matrix per expert, in the dtype of the rows, or a `QuantizedArray` with scales [e, G, F]:
            G = 1, or one for each group of numbers along D. Scales multiply numbers or sums, as suits.
        group_sizes_E: number of rows of each expert; their sum is at most R. Rows after the sum give zeros, whatever
            they hold.
        group_offset: the expert of `weights_eDF[0]`, where only `e` of the E experts are held here; it may be traced.
            Rows of experts that are not held here give zeros. None: all experts are here.
        implementation: "auto", or a name from `dispatch.implementations("grouped_matmul")`.

    Returns:
        Array in the dtype of the rows; sums are float32 inside.

    Raises:
        ValueError: shapes or dtypes disagree, or the named implementation cannot serve the call.
    """
    _check(rows_RD, group_sizes_E, group_offset, weights=weights_eDF)
    return dispatch("grouped_matmul", implementation, rows_RD, weights_eDF, group_sizes_E, group_offset)


def grouped_swiglu(
    rows_RD: Float[Array, "R D"],
    gate_eDF: Float[Array, "e D F"] | QuantizedArray,
    up_eDF: Float[Array, "e D F"] | QuantizedArray,
    group_sizes_E: Int[Array, " E"],
    group_offset: int | Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "R F"]:
    """Returns `silu(rows @ gate) * (rows @ up)` with each row's own expert, in one pass over the rows.

    Arguments, result and errors are those of `grouped_matmul`; the activation is computed in float32. Both matrices
    have one shape, and one scheme when quantised.
    """
    _check(rows_RD, group_sizes_E, group_offset, gate=gate_eDF, up=up_eDF)
    return dispatch("grouped_swiglu", implementation, rows_RD, gate_eDF, up_eDF, group_sizes_E, group_offset)


def _check(rows_RD: Array, group_sizes_E: Array, group_offset, **weights: Array | QuantizedArray) -> None:
    (_, D), (E,) = rows_RD.shape, group_sizes_E.shape
    first, *others = weights.values()
    for name, weight in weights.items():
        e = weight.shape[0]
        if weight.ndim != 3 or weight.shape[1] != D or (e != E if group_offset is None else e > E):
            raise ValueError(
                f"{name} has shape {weight.shape}; with {E} groups and rows of shape {rows_RD.shape} it must be "
                f"[{E if group_offset is None else f'at most {E}'}, {D}, F]"
            )
        if isinstance(weight, QuantizedArray):
            (_, _, F), (e_scales, G, F_scales) = weight.shape, weight.scales.shape
            if (e_scales, F_scales) != (e, F) or D % G:
                raise ValueError(f"{name} has scales of shape {weight.scales.shape}; expected [{e}, G, {F}], G | {D}")
        elif weight.dtype != rows_RD.dtype:
            raise ValueError(f"{name} is {weight.dtype} but rows are {rows_RD.dtype}; cast one of them")
    for other in others:
        if _scheme(other) != _scheme(first):
            raise ValueError(f"{' and '.join(weights)} differ: {_scheme(first)} and {_scheme(other)}")


def _scheme(weight: Array | QuantizedArray) -> tuple:
    scales = weight.scales.shape if isinstance(weight, QuantizedArray) else None
    return weight.shape, weight.dtype, scales
