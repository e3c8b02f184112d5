"""Models in few bits: matrices of the text layers become `QuantizedArray`s, everything else stays as it is.

Symmetric, in blocks along the contracted dimension, as in the published FP8 and int4 checkpoints: experts and linears
in int8 or FP8 with one scale for each output channel; int4 for experts, in groups of 128, with the linears in int8.
Router, norms, embeddings, the head and the vision tower are never quantised. Products are made by kernels that read the
small numbers (`ops.routed_experts`) and by `linear.einsum`.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from l4jax import ops
from l4jax.model.linear import Linear, contracted_axes
from l4jax.model.llama4 import Llama4
from l4jax.model.moe import Experts

SCHEMES = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e4m3fn),
    "int4": (jnp.int4, jnp.int8),
}
"""Name -> dtypes of experts and of linears."""
GROUP = 128
"""Numbers that share a scale in int4."""


def quantizable(model: Llama4) -> Iterator[tuple[nnx.Param, tuple[int, ...], bool]]:
    """Yields each parameter that is quantised, the axes over which it is contracted, and whether it is of experts."""
    for path, module in nnx.iter_modules(model.layers):
        if isinstance(module, Experts):
            for param in (module.gate_proj, module.up_proj, module.down_proj):
                yield param, (param.get_value().ndim - 2,), True
        elif isinstance(module, Linear) and "router" not in path:
            yield module.kernel, contracted_axes(module.equation, module.kernel.get_value().ndim), False


def quantize_model(model: Llama4, scheme: str) -> Llama4:
    """Returns the model in few bits; its old weights are let go one by one.

    Raises:
        ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize={scheme!r} is not one of {', '.join(SCHEMES)}")
    for param, axes, is_experts in quantizable(model):
        dtype = SCHEMES[scheme][0 if is_experts else 1]
        group = GROUP if dtype == jnp.int4 and param.get_value().shape[axes[0]] % GROUP == 0 else None
        weights = param.get_value()
        quantize = functools.partial(ops.quantize, dtype=dtype, axis=axes, group_size=group)
        abstract = isinstance(weights, jax.ShapeDtypeStruct)
        param.set_value(jax.eval_shape(quantize, weights) if abstract else jax.jit(quantize)(weights))
    return model
