"""Routed experts on meshes of eight emulated devices, against the same call on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax import ops
from l4jax.ops import experts as experts_module
from l4jax.sharding import SERVING, TRAINING, make_mesh, named_sharding, use_rules

B, T, D, F, E = 8, 16, 24, 40, 8
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"context": 2, "expert": 2, "tensor": 2},
    {"context": 4, "expert": 2},
]


def inputs(routing: str, top_k: int = 1):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    chosen = np.argsort(rng.standard_normal((B, T, E)), axis=-1)[..., :top_k]
    if routing == "all to one":
        chosen[...] = 5
    if routing == "empty experts and padding":
        chosen = np.where(chosen < 4, 1, 6)
        chosen[:, 11:] = E
    scores = rng.uniform(0.2, 1, (B, T, top_k)).astype(np.float32)
    shapes = (E, D, F), (E, D, F), (E, F, D)
    weights = [rng.standard_normal(shape).astype(np.float32) / shape[1] ** 0.5 for shape in shapes]
    return x, chosen.astype(np.int32), scores, *weights


def loss_and_gradients(x, chosen, scores, *weights):
    def loss(x, scores, *weights):
        out, load = ops.routed_experts(x, chosen, scores, *weights)
        return jnp.sin(out).sum(), (out, load)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(x, scores, *weights)


def on_mesh(sizes, arguments, rules=TRAINING):
    mesh = make_mesh(**sizes)
    axes = [("batch", "length", None)] * 3
    axes += [("expert", "expert_embed", "expert_mlp")] * 2 + [("expert", "expert_mlp", "expert_embed")]
    with use_rules(rules), jax.set_mesh(mesh):
        placed = [jax.device_put(a, named_sharding(mesh, x, a.shape)) for a, x in zip(arguments, axes, strict=True)]
        return jax.block_until_ready(jax.jit(loss_and_gradients)(*placed))


def assert_equal(results, expected):
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("form", ["exchange", "gather"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_what_one_device_gives(monkeypatch, sizes, form):
    monkeypatch.setattr(experts_module, "GATHER_BELOW", 0 if form == "exchange" else 10**6)
    arguments = inputs("random", top_k=2)
    assert_equal(on_mesh(sizes, arguments), jax.jit(loss_and_gradients)(*arguments))


@pytest.mark.parametrize("routing", ["all to one", "empty experts and padding"])
@pytest.mark.parametrize("form", ["exchange", "gather"])
@pytest.mark.parametrize("sizes", [{"expert": 8}, {"data": 2, "expert": 4}], ids=str)
def test_nothing_is_dropped_whatever_the_router_does(monkeypatch, sizes, form, routing):
    monkeypatch.setattr(experts_module, "GATHER_BELOW", 0 if form == "exchange" else 10**6)
    arguments = inputs(routing)
    assert_equal(on_mesh(sizes, arguments), jax.jit(loss_and_gradients)(*arguments))


def test_one_sequence_on_many_devices():
    """Fewer rows than devices: every device of the expert axis has the same tokens."""
    x, chosen, scores, *weights = inputs("random")
    arguments = x[:1], chosen[:1], scores[:1], *weights
    expected = jax.jit(loss_and_gradients)(*arguments)
    for rules in (TRAINING, SERVING):
        assert_equal(on_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, arguments, rules), expected)
