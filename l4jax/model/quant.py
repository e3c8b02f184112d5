"""Models in few bits: matrices of the text layers become `QuantizedArray`s, everything else stays as it is.

Symmetric, in blocks along the contracted dimension, as in the published FP8 and int4 checkpoints: experts and linears
in int8 or FP8 with one scale for each output channel; int4 for experts, in groups of 128, with the linears in int8.
Router, norms, embeddings, the head and the vision tower are never quantised. Products are made by kernels that read the
small numbers (`ops.routed_experts`) and by `linear.einsum`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

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


class Quantizable(NamedTuple):
    """A parameter that is quantised."""

    path: str
    param: nnx.Param
    axes: tuple[int, ...]
    """Over which it is contracted."""
    is_experts: bool


def quantizable(model: Llama4) -> Iterator[Quantizable]:
    """Yields each parameter that is quantised."""
    for keys, module in nnx.iter_modules(model.layers):
        path = ".".join(map(str, ("layers", *keys)))
        if isinstance(module, Experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                param = getattr(module, name)
                yield Quantizable(f"{path}.{name}", param, (param.get_value().ndim - 2,), True)
        elif isinstance(module, Linear) and "router" not in keys:
            axes = contracted_axes(module.equation, module.kernel.get_value().ndim)
            yield Quantizable(f"{path}.kernel", module.kernel, axes, False)


def quantizer(found: Quantizable, scheme: str) -> Callable[[jax.Array], ops.QuantizedArray]:
    """Returns what makes few bits of a parameter, or of a box of it that has the contracted axes whole."""
    dtype = SCHEMES[scheme][0 if found.is_experts else 1]
    group = GROUP if dtype == jnp.int4 and found.param.get_value().shape[found.axes[0]] % GROUP == 0 else None
    return functools.partial(_quantize, dtype=dtype, axis=found.axes, group_size=group)


_quantize = jax.jit(ops.quantize, static_argnames=("dtype", "axis", "group_size"))


def quantize_model(model: Llama4, scheme: str) -> Llama4:
    """Returns the model in few bits; its old weights are let go one by one.

    Raises:
        ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize={scheme!r} is not one of {', '.join(SCHEMES)}")
    for found in quantizable(model):
        weights, quantize = found.param.get_value(), quantizer(found, scheme)
        abstract = isinstance(weights, jax.ShapeDtypeStruct)
        found.param.set_value(jax.eval_shape(quantize, weights) if abstract else quantize(weights))
    return model


def train_in_low_precision(model: Llama4, kind: str) -> Llama4:
    """Returns the model with the same matrices rounded whenever they multiply; they stay wide, and learn.

    Args:
        kind: one of `ops.LowPrecision`'s: fp8, int8.
    """
    for found in quantizable(model):
        found.param.set_value(ops.LowPrecision(found.param.get_value(), kind))
    return model
