"""The mixture of experts against the formula, written out token by token, and against transformers' layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l4jax import ops
from l4jax.model.moe import MixtureOfExperts
from tests.oracle import small_config


def layer(top_k: int) -> MixtureOfExperts:
    text = small_config("small-scout", num_experts_per_tok=top_k).text_config
    return MixtureOfExperts(text, rngs=nnx.Rngs(0), dtype=jnp.float32)


def run(moe: MixtureOfExperts, x, bias=None, valid=None):
    """The layer on rows [M, D], as one batch of M tokens."""
    valid = jnp.ones((1, len(x)), bool) if valid is None else valid[None]
    out, routing = moe(x[None], valid, bias)
    return out[0], routing.load


def shared(moe: MixtureOfExperts, x):
    return moe.shared_expert(x[None])[0]


def experts(moe: MixtureOfExperts, x, index):
    """Expert `index[m]` of row m, unscaled."""
    weights = (p[...] for p in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
    return ops.routed_experts(x[None], index[None, :, None], jnp.ones((1, len(x), 1)), *weights)[0][0]


def rows(seed: int, count: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 64)), jnp.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def by_the_formula(moe: MixtureOfExperts, x: np.ndarray, top_k: int) -> np.ndarray:
    """llama4's mixture for one token at a time, in float64."""
    router = np.asarray(moe.router.kernel[...], np.float64)
    gate, up, down = (
        np.asarray(p[...], np.float64) for p in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj)
    )
    always = [
        np.asarray(p.kernel[...], np.float64)
        for p in (moe.shared_expert.gate_proj, moe.shared_expert.up_proj, moe.shared_expert.down_proj)
    ]
    out = np.zeros(x.shape)
    for i, token in enumerate(x.astype(np.float64)):
        logits = token @ router
        out[i] = (silu(token @ always[0]) * (token @ always[1])) @ always[2]
        for e in np.argsort(-logits)[:top_k]:
            scaled = token / (1 + np.exp(-logits[e]))
            out[i] += (silu(scaled @ gate[e]) * (scaled @ up[e])) @ down[e]
    return out


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_output_and_load_follow_the_formula(top_k):
    moe, x = layer(top_k), rows(0, 33)
    out, load = jax.jit(lambda x: run(moe, x))(x)
    np.testing.assert_allclose(out, by_the_formula(moe, np.asarray(x), top_k), rtol=0, atol=1e-5)
    assert load.sum() == 33 * top_k


def test_the_score_multiplies_the_input_not_the_output():
    moe, x = layer(1), rows(1, 5)
    routed = np.asarray(run(moe, x)[0] - shared(moe, x))
    logits = np.asarray(moe.router(x[None]))[0]
    scores = 1 / (1 + np.exp(-logits.max(1)))
    unscaled = np.asarray(experts(moe, x, jnp.asarray(logits.argmax(1))))
    assert np.abs(routed - scores[:, None] * unscaled).max() > 0.05 * np.abs(routed).max()


def test_a_token_does_not_depend_on_its_batch():
    moe, x = layer(1), rows(2, 16)
    whole = np.asarray(run(moe, x)[0])
    np.testing.assert_allclose(run(moe, x[3:4])[0], whole[3:4], rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(moe, x[::-1])[0][::-1], whole, rtol=0, atol=2e-6)


def test_padding_is_sent_to_no_expert():
    moe, x, valid = layer(2), rows(2, 16), jnp.arange(16) < 11
    out, load = run(moe, x, valid=valid)
    assert load.sum() == 22
    np.testing.assert_allclose(out[:11], run(moe, x)[0][:11], rtol=0, atol=2e-6)
    np.testing.assert_allclose(out[11:], shared(moe, x)[11:], rtol=0, atol=2e-6)


def test_the_bias_moves_the_choice_and_not_the_score():
    moe, x = layer(1), rows(3, 9)
    bias = jnp.array([0.0, 0.0, 100.0, 0.0])
    out, load = run(moe, x, bias)
    np.testing.assert_array_equal(load, [0, 0, 9, 0])
    score = jax.nn.sigmoid(moe.router(x[None])[0, :, 2:3])
    expected = shared(moe, x) + experts(moe, x * score, jnp.full(9, 2))
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def test_gradients_equal_those_of_the_dense_formula():
    """All tokens through all experts, masked, as in transformers: slow, differentiable, and the same function."""
    moe, x = layer(2), rows(4, 12)
    graphdef, state = nnx.split(moe)

    def sparse(state, x):
        return jnp.sin(run(nnx.merge(graphdef, state), x)[0]).sum()

    def dense(state, x):
        moe = nnx.merge(graphdef, state)
        logits = moe.router(x[None])[0]
        best, chosen = jax.lax.top_k(logits, 2)
        scores = jnp.zeros_like(logits).at[jnp.arange(12)[:, None], chosen].set(jax.nn.sigmoid(best))
        rows = x[None] * scores.T[:, :, None]
        gate, up, down = (p[...] for p in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
        hidden = jax.nn.silu(jnp.einsum("EMD,EDF->EMF", rows, gate)) * jnp.einsum("EMD,EDF->EMF", rows, up)
        return jnp.sin(shared(moe, x) + jnp.einsum("EMF,EFD->MD", hidden, down)).sum()

    ours, theirs = (jax.jit(jax.grad(f, argnums=(0, 1)))(state, x) for f in (sparse, dense))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, float(jnp.abs(b).max())))
