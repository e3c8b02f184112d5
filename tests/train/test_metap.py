import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l4jax.config import PRESETS, Llama4Config
from l4jax.model.attention import Tokens
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model
from l4jax.sharding import make_mesh
from l4jax.train import metap
from l4jax.train.config import MetaPConfig, OptimizerConfig
from l4jax.train.metap import Scale, resized, scale_by, scale_of, scaled, transferred
from l4jax.train.optimizer import make_optimizer
from l4jax.train.state import path_name
from tests.train.models import _compile_without_optimization, tiny  # noqa: F401, is for every test here

# Experts of 32 at width 32: narrower ones are so few numbers that their own noise shows.
WIDE = tiny(vocab_size=8, intermediate_size=64, intermediate_size_mlp=128)
BASE = dataclasses.replace(resized(WIDE, 32, 2), vision_config=None)
METAP = MetaPConfig(base_width=32, base_depth=2)
OPTIMIZER = OptimizerConfig(learning_rate=2**-9, warmup_steps=0, final_fraction=1.0)
B, T = 4, 16
IDS = jnp.arange(B * T).reshape(B, T) % 8  # few words: steps of one sign add up, also at the smallest width


def activations(model: Llama4) -> list[jax.Array]:
    """Returns what the embedding, each layer and the head give."""
    tokens = Tokens.create(model.config.text_config, jnp.broadcast_to(jnp.arange(T), (B, T)), None, None)
    found = [model.embed(IDS, None)]
    for block in model.layers.tail:
        found.append(block(found[-1], tokens, None, 0, None)[0])
    return [*found, model.lm_head(model.norm(found[-1]))]


def moves(config: Llama4Config, base: MetaPConfig | None) -> np.ndarray:
    """Returns the RMS of how far activations are from the initial ones after 1..5 steps, [steps, places]."""
    scale = None if base is None else functools.partial(scale_by, base, config)
    optimizer = make_optimizer(OPTIMIZER, 1000, scale_by=scale)
    graphdef = nnx.graphdef(abstract_model(config))

    def loss(params):
        found = activations(nnx.merge(graphdef, params))
        return optax.softmax_cross_entropy_with_integer_labels(found[-1][:, :-1], IDS[:, 1:]).mean(), found

    def step(state, _):
        params, opt_state = state
        grads, found = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), found

    @jax.jit
    def run():
        params = nnx.to_pure_dict(nnx.state(Llama4(config, rngs=nnx.Rngs(0))))
        params = params if base is None else scaled(params, base, config)
        _, found = jax.lax.scan(step, (params, optimizer.init(params)), length=6)
        return [jnp.sqrt(jnp.mean((x[1:] - x[0]) ** 2, axis=(1, 2, 3))) for x in found]

    with jax.set_mesh(make_mesh()):
        return np.array(run()).T


@pytest.fixture(scope="module")
def of_base():
    return moves(BASE, METAP)


def test_activations_of_wide_models_move_alike(of_base):
    ratio = moves(resized(BASE, 256, 2), METAP) / of_base
    assert np.abs(np.log(ratio)).max() < np.log(1.5)


def test_activations_of_wide_models_move_further_without_metap(of_base):
    assert (moves(resized(BASE, 256, 2), None) / of_base)[:, 1:].min() > 2


def test_last_layer_of_deep_models_moves_alike(of_base):
    """It is the sum of three times as many branches."""
    ratio = moves(resized(BASE, 32, 6), METAP)[:, -2] / of_base[:, -2]
    assert np.abs(np.log(ratio)).max() < np.log(2)


def test_folded_multiplier_equals_one_in_the_forward_pass(monkeypatch):
    """AdamW with a multiplier in the function, and AdamW of the folded weights: one function after every step."""
    multiplier, rate, eps, decay = 1 / 8, 0.1, 1e-3, 0.2
    scales = {"first": Scale(), "last": Scale(multiplier, multiplier, 1 / multiplier)}
    x, y = jax.random.normal(jax.random.key(1), (2, 16, 4))
    weights = {"first": jnp.eye(4), "last": jax.random.normal(jax.random.key(2), (4, 4))}

    def output(w, a):
        return jnp.tanh(x @ w["first"]) @ w["last"] * a

    def train(weights, multiplier, optimizer):
        state, outputs = optimizer.init(weights), []
        for _ in range(5):
            grads = jax.grad(lambda w: jnp.mean((output(w, multiplier) - y) ** 2))(weights)
            updates, state = optimizer.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
            outputs.append(output(weights, multiplier))
        return np.array(outputs)

    explicit = train(weights, multiplier, optax.adamw(rate, eps=eps, weight_decay=decay))
    config = OptimizerConfig(
        learning_rate=rate, warmup_steps=0, final_fraction=1.0, b2=0.999, eps=eps, weight_decay=decay, clip_norm=1e9
    )
    monkeypatch.setattr(metap, "scale_of", lambda path, *_: scales[path])
    optimizer = make_optimizer(config, 5, scale_by=functools.partial(scale_by, METAP, BASE))
    implicit = train(scaled(weights, METAP, BASE), 1.0, optimizer)
    np.testing.assert_allclose(implicit, explicit, atol=1e-6, rtol=1e-5)


def test_the_base_is_trained_as_without_metap():
    paths = (
        path_name(path) for path, _ in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(abstract_model(BASE))))
    )
    assert {scale_of(path, METAP, BASE) for path in paths} == {Scale()}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("embed_tokens.embedding", Scale(4**0.5, 1, 1 / 4)),
        ("layers.tail.0.input_layernorm.scale", Scale(1, 1, 1 / 12)),
        ("layers.tail.0.self_attn.q_proj.kernel", Scale(1, 1 / 4, 1 / 12)),
        ("layers.tail.0.self_attn.o_proj.kernel", Scale(1 / 3, 1 / 12, 1 / 4)),
        ("layers.cycle.0.feed_forward.experts.gate_proj", Scale(1, 1 / 4, 1 / 12)),
        ("layers.cycle.0.feed_forward.experts.down_proj", Scale(1 / 3, 1 / 12, 1 / 4)),
        ("layers.cycle.0.feed_forward.shared_expert.down_proj.kernel", Scale(1 / 3, 1 / 12, 1 / 4)),
        ("layers.cycle.0.feed_forward.router.kernel", Scale(1, 1 / 4, 1 / 3)),
        ("norm.scale", Scale(1, 1, 1 / 4)),
        ("lm_head.kernel", Scale(4**-0.5, 1 / 4, 1)),
        ("multi_modal_projector.linear_1.kernel", Scale(1, 1, 1 / 4)),
        ("vision_model.layers.tail.0.self_attn.o_proj.kernel", Scale()),
    ],
)
def test_four_times_wider_and_three_times_deeper(path, expected):
    found = scale_of(path, METAP, resized(BASE, 128, 6))
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected))


def test_weight_decay_per_step_is_that_of_the_base():
    """Without a gradient, matrices shrink by learning rate * weight decay, at any width."""
    params = {"layers": {"self_attn": {"o_proj": {"kernel": jnp.ones((2, 2))}}}}
    wide = functools.partial(scale_by, METAP, resized(BASE, 128, 6))
    optimizer = make_optimizer(OPTIMIZER, 10, scale_by=wide)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -OPTIMIZER.learning_rate * OPTIMIZER.weight_decay)


def test_transferred_settings_are_those_of_the_groups():
    rows = {name: numbers for name, *numbers in transferred(METAP, resized(BASE, 128, 6), 0.012, 1e-8)}
    assert rows["experts, out"] == ["0.3333", "0.001", "2.5e-09"]
    assert rows["embedding"] == ["2", "0.012", "2.5e-09"]


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_proxy_keeps_the_architecture(name):
    config = PRESETS[name]
    text = config.text_config
    assert resized(config, text.hidden_size, text.num_hidden_layers) == config
    small = resized(config, 1280, 6).text_config
    assert (small.num_attention_heads, small.num_key_value_heads, small.intermediate_size) == (10, 2, 2048)
    assert small.no_rope_layers == text.no_rope_layers[:6]
    assert small.moe_layers == tuple(layer for layer in text.moe_layers if layer < 6)


def test_proxy_refuses_a_part_of_a_head():
    with pytest.raises(ValueError, match=r"width 48: num_key_value_heads would be 1.5"):
        resized(BASE, 48, 2)
