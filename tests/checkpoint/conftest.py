"""Small checkpoints for the tests of this folder."""

import dataclasses

import numpy as np
import pytest

from l4jax.checkpoint import names
from l4jax.config import Llama4Config, layer_pattern, preset


@pytest.fixture
def nine_layers() -> Llama4Config:
    """Two cycles of four layers and one layer more, a mixture in every second."""
    config = preset("small-maverick")
    text = dataclasses.replace(config.text_config, num_hidden_layers=9, **layer_pattern(9, moe_step=2))
    return dataclasses.replace(config, text_config=text)


def random_parameters(config: Llama4Config, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        path: (rng.standard_normal(shape) * 0.1).astype(dtype) for path, shape in names.parameter_shapes(config).items()
    }
