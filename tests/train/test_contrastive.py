import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l4jax.train.config import ContrastiveConfig, ParallelConfig
from l4jax.train.contrastive import Contrastive, ContrastiveModel, Pairs, info_nce
from l4jax.train.step import count_targets
from tests.train.models import _compile_without_optimization, make_rows, tiny  # noqa: F401, is for every test here

N, D = 12, 8


def unit(key, shape):
    x = jax.random.normal(jax.random.key(key), shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def test_loss_equals_two_cross_entropies_of_optax():
    images, texts = unit(0, (N, D)), unit(1, (N, D))
    logits, labels = 7.0 * images @ texts.T, jnp.arange(N)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    expected = 0.5 * (cross_entropy(logits, labels) + cross_entropy(logits.T, labels))
    losses, found = info_nce(Pairs(images, texts, jnp.ones(N, bool)), jnp.array(7.0))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(found, logits.argmax(1) == labels)


def test_what_is_no_pair_does_not_count():
    valid = jnp.arange(N) % 3 > 0
    pairs = Pairs(unit(0, (N, D)), unit(1, (N, D)), valid)
    alone = Pairs(pairs.images_ND[valid], pairs.texts_ND[valid], jnp.ones(8, bool))
    losses, _ = info_nce(pairs, jnp.array(5.0))
    np.testing.assert_allclose(losses[valid], info_nce(alone, jnp.array(5.0))[0], rtol=1e-6)
    assert (losses[~valid] == 0).all()


@pytest.fixture(scope="module")
def model():
    return ContrastiveModel(tiny(), ContrastiveConfig(width=D, pairs_per_row=4), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows():
    rows, total = count_targets(make_rows(tiny(), rows=4))
    return rows | {"total": total}


def test_random_towers_know_nothing(model, rows):
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params) | {"log_scale": jnp.zeros(())}
    loss, numbers = jax.jit(lambda p: Contrastive(graphdef, ParallelConfig(), 2)(p, rows, None, None, 0))(params)
    assert float(loss) == pytest.approx(math.log(12), abs=0.05)  # four rows of three documents
    np.testing.assert_array_equal(numbers["buckets"]["tokens"], [0, 8, 0, 4])  # (text, pictures) of two sources


def test_a_pair_does_not_depend_on_its_neighbours(model, rows):
    """Neither on other documents of its row, nor does a caption see the picture or how many tiles it has."""
    pairs = jax.jit(model)(rows)
    np.testing.assert_array_equal(pairs.valid_N.reshape(4, 4)[:, :3], True)
    np.testing.assert_array_equal(pairs.valid_N.reshape(4, 4)[:, 3], False)
    second = rows["segment_ids"] == 2
    others = jax.tree.map(lambda x: x, rows)
    others["ids"] = jnp.where(second | (rows["ids"] == 271), rows["ids"], (rows["ids"] + 1) % 256)
    others["tiles"] = rows["tiles"].at[:, 0].multiply(-1).at[:, 2].multiply(-1)
    changed = jax.jit(model)(others)
    for one, other in ((pairs.images_ND, changed.images_ND), (pairs.texts_ND, changed.texts_ND)):
        one, other = one.reshape(4, 4, D), other.reshape(4, 4, D)
        np.testing.assert_allclose(one[:, 1], other[:, 1], atol=1e-5)
        assert np.abs(one[:, 0] - other[:, 0]).max() > 1e-3
    dark = jax.jit(model)(rows | {"tiles": jnp.zeros_like(rows["tiles"])})
    np.testing.assert_allclose(pairs.texts_ND, dark.texts_ND, atol=1e-6)
