"""Loss and gradients of the whole model through the kernels equal those through their specifications."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l4jax.model.llama4 import Llama4
from l4jax.train.loss import head_losses, next_token_targets
from pallas_kernels import dispatch
from tests.oracle import small_config

OPS = ("attention", "grouped_matmul", "grouped_swiglu")
B, T, PATCH = 2, 80, 271


@pytest.fixture(scope="module")
def model():
    config = small_config(
        "small-scout", hidden_size=64, head_dim=64, num_hidden_layers=2, moe_layers=(0, 1), no_rope_layers=(1, 0)
    )
    vision = dataclasses.replace(config.vision_config, num_hidden_layers=1, hidden_size=64, num_attention_heads=1)
    config = dataclasses.replace(config, vision_config=vision)
    return Llama4(config, rngs=nnx.Rngs(1), scan_layers=True)


def loss_and_gradients(model):
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 256, (B, T)).astype(np.int32)).at[:, 3:7].set(PATCH)
    segment_ids = jnp.asarray(np.repeat([[1] * 37 + [2] * 38 + [0] * 5], B, 0))
    vision = model.config.vision_config
    tiles = jnp.asarray(rng.uniform(-1, 1, (B, 1, 3, vision.image_size, vision.image_size)), jnp.float32)
    graphdef, params = nnx.split(model)

    def loss(params):
        model = nnx.merge(graphdef, params)
        x, _, _ = model.hidden(ids, tiles=tiles, segment_ids=segment_ids)
        targets, weights = next_token_targets(ids, segment_ids, jnp.ones((B, T), bool))
        losses, _ = head_losses(x, model.lm_head.kernel[...], targets)
        return jnp.sum(losses * weights) / weights.sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_equals_the_reference(model, implementation, monkeypatch):
    results = {}
    for name in ("reference", implementation):
        for op in OPS:  # `auto` has but one to choose
            monkeypatch.setitem(dispatch._registry, op, {name: dispatch._registry[op][name]})
        results[name] = loss_and_gradients(model)
        monkeypatch.undo()
    (loss, gradients), (expected_loss, expected) = results[implementation], results["reference"]
    assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss)
    leaves = list(zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True))
    whole = np.sqrt(sum(np.linalg.norm(wanted) ** 2 for _, wanted in leaves))
    for (path, gradient), wanted in leaves:
        # What is left after cancellation carries the rounding of its terms.
        limit = 1e-5 * np.linalg.norm(wanted) + 1e-7 * whole
        assert np.linalg.norm(gradient - wanted) <= limit, jax.tree_util.keystr(path)
