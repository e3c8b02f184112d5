"""Tiny models and rows for the tests of training."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from l4jax.config import PRESETS, Llama4Config
from l4jax.model.llama4 import Llama4


@pytest.fixture(scope="module", autouse=True)
def _compile_without_optimization():
    """Where it is imported: compiling takes longer than what runs there."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(num_layers: int = 2, **changes) -> Llama4Config:
    """Two layers of small-scout by default, with its vision tower of one layer: chunks, then no positions."""
    config = PRESETS["small-scout"]
    pattern = {
        "num_hidden_layers": num_layers,
        "moe_layers": tuple(range(num_layers)),
        "no_rope_layers": tuple(int(layer % 2 == 0) for layer in range(num_layers)),
    }
    text = dataclasses.replace(config.text_config, **pattern | changes)
    return dataclasses.replace(
        config, text_config=text, vision_config=dataclasses.replace(config.vision_config, num_hidden_layers=1)
    )


def split_model(config: Llama4Config, seed: int = 0):
    """Returns the structure and the parameters of a model."""
    graphdef, params = nnx.split(Llama4(config, rngs=nnx.Rngs(seed)))
    return graphdef, nnx.to_pure_dict(params)


def make_rows(config: Llama4Config, *, seed: int = 0, rows: int = 2, length: int = 48, documents: int = 3) -> dict:
    """Returns packed rows of random documents, each with one tile and text after it; a few tokens are padding."""
    rng, vision = np.random.default_rng(seed), config.vision_config
    size = length // documents
    batch = {name: np.zeros((rows, length), np.int32) for name in ("ids", "positions", "segment_ids", "source_ids")}
    batch["pictures"], batch["loss_mask"] = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    patches = vision.tokens_per_tile
    for row in range(rows):
        for document in range(documents):
            used = slice(document * size, document * size + size - int(rng.integers(0, 3)))
            count = used.stop - used.start
            batch["ids"][row, used] = rng.integers(0, 256, count)
            batch["ids"][row, used.start + 1 : used.start + 1 + patches] = config.image_token_index
            batch["positions"][row, used] = np.arange(count)
            batch["segment_ids"][row, used] = document + 1
            batch["source_ids"][row, used] = document % 2 + 1
            batch["pictures"][row, used] = 1
            batch["loss_mask"][row, used.start + 1 + patches : used.stop] = True
    side = vision.image_size
    batch["tiles"] = rng.uniform(-1, 1, (rows, documents, 3, side, side)).astype(np.float32)
    return jax.tree.map(jax.numpy.asarray, batch)
