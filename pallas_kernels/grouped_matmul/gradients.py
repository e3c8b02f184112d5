"""The routed expert matmuls and their gradients, for every pair of kernels: rows times weights, and outer products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul.finish import add, itself, swiglu, swiglu_and_parts
from pallas_kernels.quantized import QuantizedArray


class Kernels(NamedTuple):
    """What computes.

    Attributes:
        multiply: takes lists of rows and of weights [m, D, F], the groups, and by name `finish`, `first_matrix`, and
            where needed `transposed` and `num_results`; returns a list of results.
        outer_products: takes rows [R, D], others [R, F] and the groups; returns a sum [e, D, F] for each group.
    """

    multiply: Callable[..., Sequence[Array]]
    outer_products: Callable[..., Array]


class Stack(NamedTuple):
    """The matrices of all layers in one row.

    Attributes:
        weights_mDF: m = L * e matrices, plain or quantised.
        num_local: e, how many a layer has.
        first: which of them is the first of the layer that is meant.
    """

    weights_mDF: Any
    num_local: int
    first: int | Int[Array, ""]

    @classmethod
    def of(cls, weights: Any, layer: int | Int[Array, ""] | None) -> "Stack":
        """Returns weights [L, e, D, F], or [e, D, F] where `layer` is None: kernels read them where they lie."""
        num_local = weights.shape[-3]
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), weights)
        return cls(flat, num_local, 0 if layer is None else layer * num_local)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(rows_RD, weights_mDF, groups, first, kernels: Kernels):
    return kernels.multiply([rows_RD], [weights_mDF], groups, finish=itself, first_matrix=first)[0]


def _grouped_matmul_forward(rows_RD, weights_mDF, groups, first, kernels):
    return grouped_matmul(rows_RD, weights_mDF, groups, first, kernels), (rows_RD, weights_mDF, groups, first)


def _grouped_matmul_backward(kernels, residuals, d_out_RF):
    rows_RD, weights_mDF, groups, first = residuals
    (d_rows_RD,) = kernels.multiply(
        [d_out_RF], [weights_mDF], groups, finish=itself, transposed=True, first_matrix=first
    )
    if isinstance(weights_mDF, QuantizedArray):
        return d_rows_RD, None, None, None
    d_weights_eDF = kernels.outer_products(rows_RD, d_out_RF, groups)
    return d_rows_RD, _in_stack(d_weights_eDF, weights_mDF, first), None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_swiglu(rows_RD, gate_mDF, up_mDF, groups, first, kernels: Kernels):
    return kernels.multiply([rows_RD], [gate_mDF, up_mDF], groups, finish=swiglu, first_matrix=first)[0]


def _grouped_swiglu_forward(rows_RD, gate_mDF, up_mDF, groups, first, kernels):
    out_RF, gate_RF, up_RF = kernels.multiply(
        [rows_RD], [gate_mDF, up_mDF], groups, finish=swiglu_and_parts, num_results=3, first_matrix=first
    )
    return out_RF, (rows_RD, gate_mDF, up_mDF, groups, first, gate_RF, up_RF)


def _grouped_swiglu_backward(kernels, residuals, d_out_RF):
    rows_RD, gate_mDF, up_mDF, groups, first, gate_RF, up_RF = residuals
    _, backward = jax.vjp(swiglu, gate_RF.astype(jnp.float32), up_RF.astype(jnp.float32))
    d_gate_RF, d_up_RF = (d.astype(rows_RD.dtype) for d in backward([d_out_RF.astype(jnp.float32)]))
    ds, weights = [d_gate_RF, d_up_RF], [gate_mDF, up_mDF]
    (d_rows_RD,) = kernels.multiply(ds, weights, groups, finish=add, transposed=True, first_matrix=first)
    if isinstance(gate_mDF, QuantizedArray):
        return d_rows_RD, None, None, None, None
    d_gate_mDF, d_up_mDF = (
        _in_stack(kernels.outer_products(rows_RD, d_RF, groups), weight_mDF, first)
        for d_RF, weight_mDF in zip(ds, weights, strict=True)
    )
    return d_rows_RD, d_gate_mDF, d_up_mDF, None, None


grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)
grouped_swiglu.defvjp(_grouped_swiglu_forward, _grouped_swiglu_backward)


def _in_stack(d_weights_eDF: Array, weights_mDF: Array, first) -> Array:
    """Returns the gradient of all matrices, where only some took part."""
    if d_weights_eDF.shape == weights_mDF.shape:
        return d_weights_eDF
    return lax.dynamic_update_slice_in_dim(jnp.zeros_like(weights_mDF), d_weights_eDF, first, 0)
