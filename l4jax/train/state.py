"""Everything that a step changes, as one plain pytree.

The model is split once into its structure, a constant of the jitted step, and its parameters, nested dicts of arrays.
So a step costs the dispatch of one function and no walk over modules.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from l4jax.config import Llama4Config
from l4jax.model.params import param_shardings


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
    ema: dict[str, Any] | None = None
    """Running mean of the parameters, if one is kept."""

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters to evaluate and export: the running mean if there is one."""
        return self.params if self.ema is None else self.ema


def path_name(path: tuple) -> str:
    """Returns the dotted path of a leaf, `layers.tail.0.self_attn.q_proj.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def split(params: dict[str, Any], trainable: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns two trees like `params`: the parameters that learn, and the others; each has None for what it lacks.

    Args:
        trainable: regular expression at the start of their paths; empty: all.

    Raises:
        ValueError: it matches nothing.
    """

    def pick(wanted: bool):
        return jax.tree.map_with_path(
            lambda path, leaf: leaf if bool(re.match(trainable, path_name(path))) == wanted else None, params
        )

    learning = pick(True)
    if not jax.tree.leaves(learning):
        raise ValueError(f"trainable={trainable!r} matches no parameter; paths begin like {', '.join(params)}")
    return learning, pick(False)


def join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda leaf: leaf is None)


Make = Callable[[nnx.Rngs], nnx.Module]
"""Makes a new module with float32 parameters."""


def abstract_module(make: Make) -> nnx.Module:
    """Returns the module as shapes; nothing is allocated."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def init_state(
    make: Make,
    config: Llama4Config,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: TrainState,
    *,
    trainable: str = "",
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the structure of a new module, for `nnx.merge(graphdef, state.params)`, and the state before step 1.

    Every array is born in its place (`state_shardings`), and the numbers do not depend on the mesh.
    """

    def create() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed))))
        return new_state(config, optimizer, params, trainable=trainable, ema=shardings.ema is not None)

    return nnx.graphdef(abstract_module(make)), jax.jit(create, out_shardings=shardings)()


def new_state(
    config: Llama4Config,
    optimizer: optax.GradientTransformation,
    params: dict[str, Any],
    *,
    trainable: str = "",
    ema: bool = False,
) -> TrainState:
    """Returns the state in which training starts from `params`."""
    text = config.text_config
    # A dense model has one that nobody reads: Orbax saves no empty array.
    router_bias = jnp.zeros((max(len(text.moe_layers), 1), max(text.num_local_experts, 1)), jnp.float32)
    opt_state = optimizer.init(split(params, trainable)[0])
    # A copy: donated buffers may not be given twice.
    mean = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), router_bias, mean)


def state_shardings(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    offload: bool = False,
    trainable: str = "",
    ema: bool = False,
) -> TrainState:
    """Returns the place of every array of the state: moments lie where their parameters do, the rest everywhere.

    Args:
        model: what trains; may be abstract.
        offload: keep the moments in the memory of the host.
        trainable: which parameters have moments; see `split`.
        ema: whether a running mean of the parameters is kept.
    """
    flat, everywhere = param_shardings(model, mesh), NamedSharding(mesh, PartitionSpec())
    params = nnx.to_pure_dict(nnx.state(model))
    places = jax.tree.map_with_path(lambda path, _: flat[path_name(path)], params)

    def is_masked(moment) -> bool:  # where an optimizer leaves a parameter to another one
        return isinstance(moment, optax.MaskedNode)

    def place_of(moment, place: NamedSharding):
        if is_masked(moment):
            return moment
        return place.with_memory_kind("pinned_host") if offload else place

    moments = optax.tree.map_params(
        optimizer,
        place_of,
        jax.eval_shape(optimizer.init, split(params, trainable)[0]),
        split(places, trainable)[0],
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    return TrainState(places, moments, everywhere, everywhere, places if ema else None)
