"""Models and their parameters under flat names: `{"layers.tail.3.self_attn.q_proj.kernel": array, ...}`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from l4jax.config import Llama4Config
from l4jax.model.llama4 import Llama4
from l4jax.sharding import named_sharding


def abstract_model(config: Llama4Config, *, dtype=jnp.bfloat16, scan_layers: bool | None = None) -> Llama4:
    """Returns a model whose parameters are shapes and dtypes; nothing is allocated."""
    return nnx.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), dtype=dtype, scan_layers=scan_layers))


def flat_params(model: Llama4) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Returns every parameter under its dotted path."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def param_shardings(model: nnx.Module, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Returns where every parameter belongs on a mesh, under its dotted path; of a quantised one both its arrays."""
    shardings = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes, value = variable.get_metadata()["axes"], variable.get_value()
        axes = (None,) * (value.ndim - len(axes)) + tuple(axes)  # stacked layers have an axis more
        place = jax.tree.map(lambda leaf, axes=axes: named_sharding(mesh, axes, leaf.shape), value)
        shardings[".".join(map(str, path))] = place
    return shardings


def placed_params(model: Llama4, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and place of every parameter of an abstract model, under its dotted path; of a quantised one
    those of both its arrays."""

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, flat_params(model), param_shardings(model, mesh))


def with_params(model: Llama4, params: Mapping[str, jax.Array]) -> Llama4:
    """Returns `model`, which may be abstract, with the parameters given; every one of them, and no other.

    Raises:
        KeyError: a parameter is missing, or is not one of the model's.
    """
    graphdef, state = nnx.split(model)
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    if wrong := sorted(set(variables) ^ set(params)):
        raise KeyError(f"{len(wrong)} parameters are missing or unknown, the first is {wrong[0]}")
    flat = [(path, variable.replace(params[name])) for name, (path, variable) in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
