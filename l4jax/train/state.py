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
from jaxtyping import Array, Float, Int

from l4jax.config import Llama4Config
from l4jax.model.llama4 import Llama4


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
    config: Llama4Config, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the structure of a new model, for `nnx.merge(graphdef, state.params)`, and the state before step 1."""

    def create():
        graphdef, params = nnx.split(Llama4(config, rngs=nnx.Rngs(seed)))
        params = nnx.to_pure_dict(params)
        text = config.text_config
        router_bias = jnp.zeros((len(text.moe_layers), max(text.num_local_experts, 1)), jnp.float32)
        return graphdef, TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), router_bias)

    # Parameters are drawn inside of jit: one compilation instead of one for each shape. The structure, which is
    # no array, comes out of the trace by the side door.
    structure = []

    def arrays():
        graphdef, state = create()
        structure.append(graphdef)
        return state

    state = jax.jit(arrays)()
    return structure[0], state
