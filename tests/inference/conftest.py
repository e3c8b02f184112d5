"""A small model that sees, and engines over it; compiled once for the folder."""

import jax
import pytest
from flax import nnx

from l4jax.inference.engine import Engine
from l4jax.model.llama4 import Llama4
from l4jax.sharding import make_mesh
from tests.oracle import small_config

MAX_LEN = 64


@pytest.fixture(scope="session")
def small_model():
    """Three layers, the second without positions; chunks of 8 tokens, a temperature step every 4."""
    from l4jax.config import layer_pattern

    config = small_config("small-scout", num_hidden_layers=3, **layer_pattern(3, nope_interval=2))

    @jax.jit
    def create():
        return nnx.state(Llama4(config, rngs=nnx.Rngs(1)))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(1))))
    return nnx.merge(graphdef, create())


@pytest.fixture(scope="session")
def engine(small_model):
    return Engine(small_model, max_len=MAX_LEN, mesh=make_mesh())
