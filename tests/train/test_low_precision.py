"""FP8 and int8 training, against ml_dtypes and against the same formulas by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from l4jax.model.llama4 import Llama4
from l4jax.model.quant import quantizable, quantize_model, train_in_low_precision
from l4jax.ops.low_precision import LowPrecision, round_fp8, round_int8
from l4jax.sharding import TRAINING, make_mesh, use_rules
from l4jax.train.config import ParallelConfig
from l4jax.train.objective import NextToken
from l4jax.train.step import count_targets
from tests.train.models import _compile_without_optimization, make_rows, split_model, tiny  # noqa: F401, is for every test here


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("wide", [jnp.float32, jnp.bfloat16])
def test_rounding_equals_that_of_ml_dtypes(dtype, wide):
    x = (jax.random.normal(jax.random.key(0), (64, 33)) * jnp.exp2(jnp.arange(33.0) - 20)).astype(wide)
    rounded = round_fp8(x, jnp.dtype(dtype))
    assert rounded.dtype == wide
    largest = float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** (np.floor(np.log2(np.abs(np.float64(x)).max() / largest)) + 1)
    expected = (np.float64(x) / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale
    np.testing.assert_array_equal(np.float64(rounded), expected)  # exactly: scales are powers of two
    assert np.abs(np.float64(rounded)).max() / scale > largest / 2.2  # and no range is given away


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    assert not np.isfinite(round_fp8(jnp.array([1.0, bad]), jnp.float8_e5m2)).any()


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(round_fp8(jnp.zeros((3, 3)), jnp.float8_e4m3fn), 0)
    np.testing.assert_array_equal(round_int8(jnp.zeros((3, 3)), (0,)), 0)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_product_and_gradients_follow_the_formula(kind):
    x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 7), (7, 3), (5, 3)]))

    def run(x, w):
        return LowPrecision(w, kind).product(jnp.matmul, x, (-1,), (-2,))

    y, backward = jax.vjp(run, x, w)
    if kind == "fp8":
        x_, w_ = (round_fp8(a, jnp.float8_e4m3fn) for a in (x, w))
        g_ = round_fp8(g, jnp.float8_e5m2)
    else:
        x_, w_, g_ = round_int8(x, (1,)), round_int8(w, (0,)), g
    np.testing.assert_array_equal(y, x_ @ w_)
    d_x, d_w = backward(g)
    np.testing.assert_allclose(d_x, g_ @ w_.T, rtol=1e-6)
    np.testing.assert_allclose(d_w, x_.T @ g_, rtol=1e-6)


def test_int8_rounds_weights_as_served():
    """What is trained is what `convert --quantize int8` makes of it."""
    config = tiny()
    model, served = (Llama4(config, rngs=nnx.Rngs(0)) for _ in range(2))
    quantize_model(served, "int8")
    for ours, theirs in zip(quantizable(model), quantizable(served), strict=True):
        expected = theirs.param.get_value().dequantize(jnp.float32)
        np.testing.assert_allclose(
            round_int8(ours.param.get_value(), ours.axes), expected, atol=1e-6, err_msg=ours.path
        )


@pytest.fixture(scope="module")
def case():
    config = tiny()
    rows, total = count_targets(make_rows(config))
    return split_model(config), rows | {"total": total}


def loss_of(case, parallel, router_bias=None):
    (graphdef, params), rows = case
    objective = NextToken(graphdef, parallel, num_sources=2)
    return jax.value_and_grad(lambda p: objective(p, rows, None, router_bias, 0)[0]), params


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_loss_and_gradients_are_near_the_wide_ones(case, kind):
    wide, params = loss_of(case, ParallelConfig())
    narrow, _ = loss_of(case, ParallelConfig(low_precision=kind, remat="full"))
    (loss, grads), (expected, expected_grads) = jax.jit(narrow)(params), jax.jit(wide)(params)
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    assert float(loss) != float(expected)
    pairs = list(zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True))
    dot = sum(float((a * b).sum()) for a, b in pairs)
    norms = [np.sqrt(sum(float((x * x).sum()) for x in tree)) for tree in zip(*pairs, strict=True)]
    assert dot / (norms[0] * norms[1]) > (0.95 if kind == "fp8" else 0.98)


def test_every_product_of_the_text_layers_is_rounded_and_no_other(case):
    """Counts conversions: e4m3 of two operands a product, e5m2 of one gradient."""
    run, params = loss_of(case, ParallelConfig(low_precision="fp8"))
    text = str(jax.make_jaxpr(run)(params))
    layers, products = 2, 4 + 3 + 3  # attention, shared expert, experts
    assert text.count("new_dtype=float8_e5m2") == layers * products
    # The experts' input and that of gate and up of the shared one are rounded once for each of two products.
    assert text.count("new_dtype=float8_e4m3fn") == layers * products * 2


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2}])
def test_on_a_mesh_it_is_about_the_same(case, sizes):
    run, params = loss_of(case, ParallelConfig(low_precision="fp8"))
    alone, _ = jax.jit(run)(params)
    with jax.set_mesh(make_mesh(**sizes)), use_rules(TRAINING):
        together, _ = jax.jit(run)(params)
    assert float(together) == pytest.approx(float(alone), rel=0.01)  # each device has scales of its own


def test_weights_stay_wide():
    model = train_in_low_precision(Llama4(tiny(), rngs=nnx.Rngs(0)), "fp8")
    kernel = model.layers.tail[0].self_attn.q_proj.kernel.get_value()
    assert kernel.kernel.dtype == jnp.float32
    assert not isinstance(model.layers.tail[0].feed_forward.router.kernel.get_value(), LowPrecision)
