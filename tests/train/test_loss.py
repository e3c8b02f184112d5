import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l4jax.ops import head as head_module
from l4jax.train.loss import head_losses, masked_sum, next_token_targets, token_losses


def test_cross_entropy_equals_optax():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 11)) * 4
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(token_losses(logits, targets).losses, expected, atol=1e-6)
    np.testing.assert_array_equal(token_losses(logits, targets).right, logits.argmax(-1) == targets)


def test_gradient_of_cross_entropy_equals_that_of_optax():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 11)) * 4
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    weights = jax.random.normal(jax.random.key(2), (2, 5))

    def mine(logits):
        return (token_losses(logits, targets).losses * weights).sum()

    def theirs(logits):
        return (optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()

    np.testing.assert_allclose(jax.grad(mine)(logits), jax.grad(theirs)(logits), atol=1e-6)


@pytest.mark.parametrize("at_once", [2 * 12 * 11, 2 * 4 * 11, 2 * 11])
def test_losses_by_blocks_equal_losses_at_once_with_gradients(monkeypatch, at_once):
    hidden = jax.random.normal(jax.random.key(0), (2, 12, 6))
    kernel = jax.random.normal(jax.random.key(1), (6, 11))
    targets = jax.random.randint(jax.random.key(2), (2, 12), 0, 11)

    def loss(hidden, kernel):
        return jnp.square(head_losses(hidden, kernel, targets).losses).sum()

    def whole(hidden, kernel):
        return jnp.square(token_losses(hidden @ kernel, targets).losses).sum()

    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", at_once)
    results = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    expected = jax.value_and_grad(whole, argnums=(0, 1))(hidden, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), results, expected)
    np.testing.assert_array_equal(
        head_losses(hidden, kernel, targets).right, token_losses(hidden @ kernel, targets).right
    )


def test_bfloat16_logits_are_summed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (1, 3, 4096)).astype(jnp.bfloat16)
    targets = jnp.zeros((1, 3), jnp.int32)
    np.testing.assert_allclose(
        token_losses(logits, targets).losses, token_losses(logits.astype(jnp.float32), targets).losses, atol=1e-6
    )


@pytest.mark.oracle
def test_masked_loss_equals_torch():
    import torch

    logits = np.random.default_rng(0).normal(size=(2, 6, 7)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 7, size=(2, 6))
    learned = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1]], bool)
    labels = torch.from_numpy(np.where(learned, ids, -100))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits)[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    )
    targets, counts = next_token_targets(jnp.asarray(ids), jnp.ones((2, 6), jnp.int32), jnp.asarray(learned))
    loss = masked_sum(token_losses(jnp.asarray(logits), targets).losses, counts) / counts.sum()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    assert counts.sum() == learned[:, 1:].sum()


def test_packed_documents_do_not_predict_one_another():
    ids = jnp.array([[1, 2, 3, 4, 5, 0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    targets, counts = next_token_targets(ids, segments, jnp.ones_like(ids, bool))
    assert counts.tolist() == [[True, False, True, True, False, False]]
    assert targets[0, :4].tolist() == [2, 3, 4, 5]


def test_what_is_not_marked_does_not_count_not_even_infinity():
    values = jnp.array([[1.0, jnp.inf, 1.0], [5.0, jnp.nan, 0.0]])
    mask = jnp.array([[True, False, True], [True, False, False]])
    assert masked_sum(values, mask) == 7.0
