"""Everything that a step changes, as one plain pytree.

The model is split once into its structure, a constant of the jitted step, and its parameters, nested dicts of arrays.
So a step costs the dispatch of one function and no walk over modules.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from l4jax.config import Llama4Config
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model, param_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The arrays of a run."""

    params: dict[str, Any]
    """As the modules name them: `params["layers"]["tail"][0]["self_attn"]["q_proj"]["kernel"]`."""
    opt_state: optax.OptState
    step: Int[Array, ""]
    """Steps taken."""
    router_bias: Float[Array, "L E"]
    """Per mixture layer and expert; see `balance.py`. Not a parameter, and not part of the model that comes out."""


def init_state(
    config: Llama4Config, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the structure of a new model, for `nnx.merge(graphdef, state.params)`, and the state before step 1.

    Every array is born in its place (`state_shardings`), and the numbers do not depend on the mesh.
    """

    def create() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(Llama4(config, rngs=nnx.Rngs(seed))))
        return new_state(config, optimizer, params)

    graphdef = nnx.graphdef(abstract_model(config, dtype=jnp.float32))
    return graphdef, jax.jit(create, out_shardings=shardings)()


def new_state(config: Llama4Config, optimizer: optax.GradientTransformation, params: dict[str, Any]) -> TrainState:
    """Returns the state in which training starts from `params`."""
    text = config.text_config
    router_bias = jnp.zeros((len(text.moe_layers), max(text.num_local_experts, 1)), jnp.float32)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), router_bias)


def state_shardings(
    config: Llama4Config, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """Returns the place of every array of the state: moments lie where their parameters do, the rest everywhere.

    Args:
        offload: keep the moments in the memory of the host.
    """
    model = abstract_model(config, dtype=jnp.float32)
    flat, everywhere = param_shardings(model, mesh), NamedSharding(mesh, PartitionSpec())
    params = nnx.to_pure_dict(nnx.state(model))
    places = jax.tree.map_with_path(
        lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator=".")], params
    )
    moments = optax.tree.map_params(
        optimizer,
        lambda _, place: place.with_memory_kind("pinned_host") if offload else place,
        jax.eval_shape(optimizer.init, params),
        places,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(places, moments, everywhere, everywhere)
