import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from l4jax.model.llama4 import Llama4
from l4jax.model.moe import Routing
from l4jax.sharding import make_mesh
from l4jax.train.balance import balance_loss, z_loss
from l4jax.train.config import OptimizerConfig, ParallelConfig, RouterConfig
from l4jax.train.objective import NextToken
from l4jax.train.optimizer import make_optimizer, matrix_axes
from l4jax.train.state import init_state, join, split, state_shardings
from l4jax.train.step import GROUPS, count_targets, group_of, make_train_step
from tests.train.models import _compile_without_optimization, make_rows, split_model, tiny  # noqa: F401, is for every test here

CONFIG = tiny(num_local_experts=4)
VISION = "vision_model|multi_modal_projector"


@pytest.fixture(scope="module")
def rows():
    return make_rows(CONFIG)


def train(rows, steps=3, *, trainable="", ema_decay=0.0, **settings):
    """Returns the states before and after some steps on the same rows, and the numbers of the last one."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, **settings), 100)

    def make(rngs):
        return Llama4(CONFIG, rngs=rngs)

    options = {"trainable": trainable, "ema": ema_decay > 0}
    shardings = state_shardings(nnx.eval_shape(lambda: make(nnx.Rngs(0))), optimizer, make_mesh(), **options)
    graphdef, state = init_state(make, CONFIG, optimizer, 0, shardings, trainable=trainable)
    first = jax.tree.map(jnp.copy, state)
    parallel = ParallelConfig()
    objective = NextToken(graphdef, parallel, num_sources=2)
    step = make_train_step(
        objective, optimizer, parallel, shardings, trainable=trainable, ema_decay=ema_decay, router_bias_rate=0.01
    )
    losses = []
    for _ in range(steps):
        state, numbers = step(state, rows, None)
        losses.append(float(numbers["loss_now"]))
    return first, state, losses, numbers


def test_numbers_are_by_source_and_modality_and_by_group(rows):
    _, _, losses, numbers = train(rows, 1)
    buckets, (_, total) = numbers["buckets"], count_targets(rows)
    np.testing.assert_allclose(buckets["loss"].sum() / total, losses[0], rtol=1e-6)
    assert (buckets["tokens"][::2] == 0).all()  # no document is without pictures
    assert (buckets["tokens"][1::2] > 0).all()  # and there are two sources
    assert numbers["grad_norms"].keys() == set(GROUPS) - {"other"}
    norm = np.sqrt(sum(float(x) ** 2 for x in numbers["grad_norms"].values()))
    np.testing.assert_allclose(norm, numbers["grad_norm"], rtol=1e-5)
    assert all(1e-4 < float(ratio) < 1 for ratio in numbers["update_ratios"].values())


def test_what_does_not_learn_keeps_its_bytes_and_has_no_moments(rows):
    first, last, losses, numbers = train(rows, trainable=VISION)
    for path, before in jax.tree.leaves_with_path(first.params):
        after = jax.tree.reduce(lambda _, x: x, _at(last.params, path))
        same = np.array_equal(before, after)
        assert same == (group_of(jax.tree_util.keystr(path, simple=True, separator=".")) != "vision"), path
    assert losses[-1] < losses[0]
    assert numbers["grad_norms"].keys() == {"vision"}
    num_vision = len(jax.tree.leaves(split(first.params, VISION)[0]))
    moments = [leaf for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim]
    assert len(moments) == 2 * num_vision


def _at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def test_split_and_join_are_inverse_and_a_pattern_must_match():
    _, params = split_model(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, join(*split(params, "lm_head")), params)
    with pytest.raises(ValueError, match="trainable='vison' matches no parameter; paths begin like embed_tokens"):
        split(params, "vison")


def test_running_mean_follows_the_weights(rows):
    first, last, _, _ = train(rows, 2, ema_decay=0.5)
    _, after_one, _, _ = train(rows, 1, ema_decay=0.5)

    def check(mean, p0, p1, p2):
        np.testing.assert_allclose(mean, 0.25 * p0 + 0.25 * p1 + 0.5 * p2, atol=1e-6)

    jax.tree.map(check, last.ema, first.params, after_one.params, last.params)
    assert last.averaged is last.ema


def test_muon_orthogonalises_each_matrix_of_each_expert_and_leaves_embeddings_to_adam(rows):
    _, params = split_model(CONFIG)
    axes = matrix_axes(params)
    layer = axes["layers"]["tail"][0]
    assert layer["self_attn"]["q_proj"]["kernel"] == optax.contrib.MuonDimensionNumbers(0, (1, 2))
    assert layer["self_attn"]["o_proj"]["kernel"] == optax.contrib.MuonDimensionNumbers((0, 1), 2)
    assert layer["feed_forward"]["experts"]["up_proj"] == optax.contrib.MuonDimensionNumbers(1, 2)
    assert layer["feed_forward"]["router"]["kernel"] is None
    assert axes["embed_tokens"]["embedding"] is axes["lm_head"]["kernel"] is None

    first, last, losses, _ = train(rows, 1, name="muon", weight_decay=0.0, clip_norm=1e9)
    assert train(rows, 3, name="muon")[2][-1] < losses[0]
    kernel = ["layers", "tail", 0, "self_attn", "q_proj", "kernel"]
    before, after = (np.asarray(_named(state.params, kernel)).reshape(CONFIG.text_config.hidden_size, -1)
                     for state in (first, last))  # fmt: skip
    scales = np.linalg.svd(after - before, compute_uv=False)
    assert scales[0] / np.median(scales) < 2  # small ones are of directions that the gradient hardly has
    embedding = first.params["embed_tokens"]["embedding"] - last.params["embed_tokens"]["embedding"]
    moved = np.abs(embedding)[np.unique(rows["ids"])]
    np.testing.assert_allclose(np.quantile(moved, [0.1, 0.9]), np.median(moved), rtol=0.01)  # Adam: all alike at first


def _named(tree, names):
    for name in names:
        tree = tree[name]
    return tree


def test_router_losses_follow_their_formulas():
    rng = np.random.default_rng(0)
    load, importance, z = rng.integers(1, 9, (3, 4)), rng.uniform(0, 5, (3, 4)), rng.uniform(0, 9, 3)
    routing = Routing(*map(jnp.asarray, (load, importance, z)))
    switch = [4 * (f / f.sum() * p / p.sum()).sum() for f, p in zip(load, importance, strict=True)]
    np.testing.assert_allclose(balance_loss(routing), np.mean(switch), rtol=1e-6)
    np.testing.assert_allclose(z_loss(routing), np.mean(z / importance.sum(-1)), rtol=1e-6)


def test_router_losses_change_what_is_minimised(rows):
    graphdef, params = split_model(CONFIG)
    counted, total = count_targets(rows)

    def loss_with(**router) -> float:
        objective = NextToken(graphdef, ParallelConfig(), RouterConfig(**router), num_sources=2)
        return float(jax.jit(lambda p: objective(p, counted | {"total": total}, None, None, 0)[0])(params))

    plain = loss_with()
    assert loss_with(balance_loss=0.5) - plain == pytest.approx(0.5, abs=0.2)  # 1 in balance
    assert loss_with(z_loss=0.1) > plain + 0.1


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("layers.cycle.0.self_attn.q_proj.kernel", "attention"),
        ("layers.tail.3.feed_forward.router.kernel", "router"),
        ("layers.tail.3.feed_forward.experts.gate_proj", "experts"),
        ("layers.tail.3.feed_forward.shared_expert.gate_proj.kernel", "dense"),
        ("layers.tail.3.input_layernorm.scale", "norm"),
        ("norm.scale", "norm"),
        ("vision_model.layers.tail.0.self_attn.q_proj.bias", "vision"),
        ("embed_tokens.embedding", "embedding"),
        ("lm_head.kernel", "head"),
        ("image_head.kernel", "other"),
    ],
)
def test_groups(path, group):
    assert group_of(path) == group
