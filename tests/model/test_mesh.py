"""The whole model on meshes of eight emulated devices gives the logits, the loss and the gradients of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l4jax import ops
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model, flat_params, param_shardings, with_params
from l4jax.ops import experts as experts_module
from l4jax.ops import self_attention as attention_module
from l4jax.sharding import SERVING, TRAINING, make_mesh, named_sharding, use_rules
from l4jax.train.loss import head_losses, masked_sum, next_token_targets
from l4jax.train.step import BATCH_AXES
from tests.oracle import small_config

B, T, CHUNK, PATCH = 8, 64, 8, 271
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 8},
    {"context": 2, "expert": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def config():
    config = small_config(
        "small-scout",
        hidden_size=64,
        num_hidden_layers=4,
        num_local_experts=8,
        moe_layers=(0, 1, 2, 3),
        no_rope_layers=(1, 1, 1, 0),
    )
    return dataclasses.replace(config, vision_config=dataclasses.replace(config.vision_config, num_hidden_layers=1))


@pytest.fixture(scope="module")
def params(config):
    return jax.jit(lambda: flat_params(Llama4(config, rngs=nnx.Rngs(1), scan_layers=True)))()


@pytest.fixture(scope="module")
def batch():
    """Two packed documents a row, their edge at no multiple of anything, padding behind, and a picture each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (B, T)).astype(np.int32)
    ids[:, 3:7] = ids[:, 40:44] = PATCH
    lengths = rng.integers(17, 30, B), rng.integers(24, 34, B)
    segment_ids = np.zeros((B, T), np.int32)
    positions = np.zeros((B, T), np.int32)
    for row, (first, second) in enumerate(zip(*lengths, strict=True)):
        segment_ids[row, :first], segment_ids[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    tiles = rng.uniform(-1, 1, (B, 2, 3, 56, 56)).astype(np.float32)
    return {"ids": ids, "positions": positions, "segment_ids": segment_ids, "tiles": tiles}


def loss_of(model, batch, remat="none"):
    segment_ids = batch.get("segment_ids")
    hidden, _, routing = model.hidden(remat=remat, **batch)
    mask = jnp.ones(batch["ids"].shape, bool) if segment_ids is None else segment_ids > 0
    segments = jnp.ones(batch["ids"].shape, jnp.int32) if segment_ids is None else segment_ids
    targets, counts = next_token_targets(batch["ids"], segments, mask)
    losses = head_losses(hidden, model.lm_head.kernel[...], targets).losses
    return masked_sum(losses, counts) / counts.sum(), routing.load


def loss_and_gradients(config, params, batch, remat="none"):
    abstract = abstract_model(config, dtype=jnp.float32, scan_layers=True)

    def loss(params):
        return loss_of(with_params(abstract, params), batch, remat)

    return jax.value_and_grad(loss, has_aux=True)(params)


def place(config, params, batch, mesh):
    shardings = param_shardings(abstract_model(config, dtype=jnp.float32, scan_layers=True), mesh)
    placed = {name: jax.device_put(value, shardings[name]) for name, value in params.items()}
    places = {name: named_sharding(mesh, BATCH_AXES[name], value.shape) for name, value in batch.items()}
    return placed, jax.device_put(batch, places)


def on_mesh(sizes, config, params, batch, function, rules=TRAINING):
    mesh = make_mesh(**sizes)
    with use_rules(rules), jax.set_mesh(mesh):
        placed = place(config, params, batch, mesh)
        return jax.block_until_ready(jax.jit(function)(*placed))


def assert_close(results, expected):
    """Relative error of each array at most 1e-5, by Frobenius norm."""
    for (path, a), b in zip(jax.tree.leaves_with_path(results), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def expected(config, params, batch):
    return jax.jit(lambda p, b: loss_and_gradients(config, p, b))(params, batch)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loss_gradients_and_load_equal_those_of_one_device(monkeypatch, config, params, batch, expected, sizes):
    monkeypatch.setattr(experts_module, "GATHER_BELOW", 0)  # exchange, as training at scale does
    monkeypatch.setattr(attention_module, "GATHER_BELOW", 0)  # ring
    results = on_mesh(sizes, config, params, batch, lambda p, b: loss_and_gradients(config, p, b, remat="full"))
    assert_close(results, expected)


@pytest.mark.parametrize("sizes", [{"context": 2, "expert": 2, "tensor": 2}, {"context": 4, "data": 2}], ids=str)
def test_plain_rows_without_segments(config, params, batch, sizes):
    """Blocks of whole chunks: chunked layers need nothing from their neighbours."""
    plain = {"ids": batch["ids"], "tiles": batch["tiles"]}
    wanted = jax.jit(lambda p, b: loss_and_gradients(config, p, b))(params, plain)
    assert_close(on_mesh(sizes, config, params, plain, lambda p, b: loss_and_gradients(config, p, b)), wanted)


@pytest.mark.parametrize(
    "sizes", [{"context": 2, "expert": 2, "tensor": 2}, {"context": 8}, {"data": 2, "fsdp": 2, "expert": 2}], ids=str
)
def test_prefill_in_pieces_and_decoding_over_an_edge(config, params, batch, sizes):
    abstract = abstract_model(config, dtype=jnp.float32, scan_layers=True)
    ids = batch["ids"][:, :40]

    def run(params, batch):
        model = with_params(abstract, params)
        cache, logits = model.init_cache(B, 40), []
        features = model.encode_tiles(batch["tiles"])
        for start, stop in ((0, 16), (16, 32)):
            out, cache = model(ids[:, start:stop], image_features=features if start == 0 else None, cache=cache)
            logits.append(out)
        for t in range(32, 40):
            out, cache = model(ids[:, t : t + 1], cache=cache)
            logits.append(out)
        return jnp.concatenate(logits, axis=1)

    def whole(params, batch):
        return with_params(abstract, params)(ids, tiles=batch["tiles"])[0]

    ids = jnp.asarray(np.where(np.arange(40) < 32, ids, 7), jnp.int32)  # no picture after the first piece
    wanted = np.asarray(jax.jit(whole)(params, batch))
    results = np.asarray(on_mesh(sizes, config, params, batch, run, SERVING))
    np.testing.assert_allclose(results, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_balanced_order_is_a_permutation_and_comes_back(num_devices):
    mesh = make_mesh(context=num_devices)
    x = jnp.arange(2 * 64).reshape(2, 64)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, named_sharding(mesh, ("batch", "length"), x.shape))
        balanced = jax.jit(ops.to_balanced)(placed)
        back = jax.jit(ops.to_natural)(balanced)
    np.testing.assert_array_equal(back, x)
    blocks = np.arange(64).reshape(2 * num_devices, -1)
    order = np.concatenate([blocks[[i, 2 * num_devices - 1 - i]].reshape(-1) for i in range(num_devices)])
    np.testing.assert_array_equal(balanced[0], order)
