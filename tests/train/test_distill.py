import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l4jax.ops import head as head_module
from l4jax.sharding import TRAINING, make_mesh, use_rules
from l4jax.train.config import DistillConfig, ParallelConfig, RouterConfig
from l4jax.train.distill import Distill, divergence, soft_targets, soft_weight
from l4jax.train.objective import NextToken
from l4jax.train.step import count_targets
from tests.train.models import _compile_without_optimization, make_rows, split_model, tiny  # noqa: F401, is for every test here

V = 11
STUDENT, TEACHER = (jax.random.normal(jax.random.key(seed), (2, 5, V)) * 3 for seed in (0, 1))
TARGETS = jax.random.randint(jax.random.key(2), (2, 5), 0, V)


def kl(student, top_k=0):
    targets = soft_targets(TEACHER, TARGETS, top_k)
    return divergence(jax.nn.log_softmax(student), targets.ids, targets.logprobs)


def test_divergence_equals_optax():
    expected = optax.losses.kl_divergence_with_log_targets(*map(jax.nn.log_softmax, (STUDENT, TEACHER)))
    np.testing.assert_allclose(kl(STUDENT), expected, atol=1e-6)


def test_all_tokens_but_one_equal_all_tokens():
    np.testing.assert_allclose(kl(STUDENT, V - 1), kl(STUDENT), rtol=2e-3)  # the rest is 1 minus a sum near 1
    np.testing.assert_array_equal(kl(STUDENT, V), kl(STUDENT))


def test_the_rest_is_one_token():
    student, teacher = (np.asarray(jax.nn.softmax(x), np.float64) for x in (STUDENT, TEACHER))
    order = np.argsort(-teacher, axis=-1)[..., :3]
    pair = [np.take_along_axis(p, order, -1) for p in (teacher, student)]
    t, s = (np.concatenate([p, 1 - p.sum(-1, keepdims=True)], -1) for p in pair)
    np.testing.assert_allclose(kl(STUDENT, 3), (t * np.log(t / s)).sum(-1), rtol=1e-4)
    assert (kl(STUDENT, 3) < kl(STUDENT)).all()  # merging tokens loses information


def test_gradient_is_the_difference_of_distributions():
    gradient = jax.grad(lambda student: kl(student).sum())(STUDENT)
    np.testing.assert_allclose(gradient, jax.nn.softmax(STUDENT) - jax.nn.softmax(TEACHER), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8]),
        ("linear", [0.6, 0.6, 0.6]),
        ("cosine", [0.8 * 0.5 * (1 + np.cos(np.pi / 4))] * 3),
        ("teacher", [0.1, 0.5, 0.9]),  # 1 - p_T
        ("gap", [1 / (1 + np.exp(-2 * np.log(0.9 / 0.5))), 0.5, 1 / (1 + np.exp(-2 * np.log(0.1 / 0.5)))]),
    ],
)
def test_weights(name, expected):
    teacher, student = jnp.log(jnp.array([0.9, 0.5, 0.1])), jnp.log(jnp.full(3, 0.5))
    settings = DistillConfig(teacher="", weight=name, constant=0.8, tau=0.5)
    np.testing.assert_allclose(soft_weight(settings, teacher, student, jnp.array(0.25)), expected, rtol=1e-6)


def test_no_gradient_flows_through_the_weight():
    settings = DistillConfig(teacher="", weight="gap")
    gradient = jax.grad(lambda s: soft_weight(settings, jnp.zeros(3), s, jnp.zeros(())).sum())(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 0)


@pytest.fixture(scope="module")
def pair():
    config = tiny()
    student, teacher = split_model(config), split_model(tiny(1, hidden_size=48), seed=1)
    rows, total = count_targets(make_rows(config))
    return student, teacher, rows | {"total": total}


def loss_of(pair, **settings):
    (graphdef, params), (teacher, fixed), rows = pair
    settings = DistillConfig(teacher="", **settings)
    objective = Distill(graphdef, ParallelConfig(), RouterConfig(), 2, settings=settings, teacher=teacher, steps=100)
    run = jax.jit(jax.value_and_grad(lambda p: objective(p, rows, fixed, None, jnp.array(25)), has_aux=True))
    return run(params)


def test_without_soft_targets_it_is_the_next_token_loss(pair):
    (graphdef, params), _, rows = pair
    (loss, numbers), grads = loss_of(pair, weight="constant", constant=0.0)
    plain = NextToken(graphdef, ParallelConfig(), num_sources=2)
    run = jax.jit(jax.value_and_grad(lambda p: plain(p, rows, None, None, 0), has_aux=True))
    (expected, expected_numbers), expected_grads = run(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(numbers["buckets"]["loss"], expected_numbers["buckets"]["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected_grads)


def test_blocks_of_logits_change_nothing(pair, monkeypatch):
    (whole, numbers), grads = loss_of(pair, top_k=8)
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 2 * 12 * 512)
    (blocks, block_numbers), block_grads = loss_of(pair, top_k=8)
    np.testing.assert_allclose(whole, blocks, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), numbers, block_numbers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads, block_grads)


def test_on_a_mesh_it_is_the_same(pair):
    (whole, numbers), grads = loss_of(pair, top_k=8)
    with jax.set_mesh(make_mesh(fsdp=2)), use_rules(TRAINING):
        (together, mesh_numbers), mesh_grads = loss_of(pair, top_k=8)
    np.testing.assert_allclose(whole, together, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), numbers, mesh_numbers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), grads, mesh_grads)
