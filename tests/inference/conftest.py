"""A small model that sees, and engines over it; compiled once for the folder."""

import jax
import numpy as np
import pytest

from l4jax.config import layer_pattern
from l4jax.inference.engine import Engine
from l4jax.model.params import abstract_model, flat_params, with_params
from l4jax.sharding import make_mesh
from tests.oracle import small_config

MAX_LEN = 64


@pytest.fixture(scope="session")
def small_model():
    """Three layers, the second without positions; chunks of 8 tokens, a temperature step every 4."""
    config = small_config("small-scout", num_hidden_layers=3, **layer_pattern(3, nope_interval=2))

    model, rng = abstract_model(config, dtype=np.float32, scan_layers=False), np.random.default_rng(1)
    shapes = {path: leaf.shape for path, leaf in flat_params(model).items()}
    params = {path: rng.standard_normal(shape, np.float32) / 8 + (len(shape) == 1) for path, shape in shapes.items()}
    return with_params(model, jax.device_put(params))


@pytest.fixture(scope="session")
def engine(small_model):
    return Engine(small_model, max_len=MAX_LEN, mesh=make_mesh())
