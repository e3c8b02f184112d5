import logging

import jax.numpy as jnp
import pytest

from pallas_kernels import attention, decode_attention, dispatch, grouped_matmul, grouped_swiglu


@pytest.fixture
def op():
    name = "test_op"
    dispatch.register(name, "fast", lambda x: ("fast", x), lambda x: "odd number" if x % 2 else None)
    dispatch.register(name, "slow", lambda x: ("slow", x))
    yield name
    del dispatch._registry[name]
    dispatch._log_choice.cache_clear()


def test_auto_takes_the_first_that_serves_and_says_once_why(op, caplog):
    caplog.set_level(logging.INFO, logger="pallas_kernels.dispatch")
    assert dispatch.dispatch(op, "auto", 2) == ("fast", 2)
    assert dispatch.dispatch(op, "auto", 3) == ("slow", 3)
    assert dispatch.dispatch(op, "auto", 5) == ("slow", 5)
    assert caplog.messages == [
        "test_op: auto chose fast (first choice)",
        "test_op: auto chose slow (passed over fast: odd number)",
    ]


def test_a_named_implementation_serves_or_raises(op):
    assert dispatch.dispatch(op, "fast", 2) == ("fast", 2)
    with pytest.raises(ValueError, match=r"'fast' cannot serve this call: odd number"):
        dispatch.dispatch(op, "fast", 3)
    with pytest.raises(ValueError, match=r"no implementation 'warp'; choose one of: auto, fast, slow"):
        dispatch.dispatch(op, "warp", 3)


def test_no_implementation_at_all_names_every_reason():
    dispatch.register("test_hopeless", "only", lambda: None, lambda: "never")
    with pytest.raises(ValueError, match="only: never"):
        dispatch.dispatch("test_hopeless", "auto")
    del dispatch._registry["test_hopeless"]


@pytest.mark.parametrize("name", ["attention", "decode_attention", "grouped_matmul", "grouped_swiglu"])
def test_every_op_has_a_reference(name):
    assert dispatch.implementations(name)[-1] == "reference"


def test_arguments_that_do_not_fit_are_refused():
    q, kv, rows = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4, 2, 8)), jnp.ones((4, 8))
    weights, sizes = jnp.ones((2, 8, 8)), jnp.array([1, 3])
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, jnp.ones((1, 4, 3, 8)), jnp.ones((1, 4, 3, 8)))
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, kv.astype(jnp.bfloat16), kv)
    with pytest.raises(ValueError, match="scale=0"):
        attention(q, kv, kv, scale=0.0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        attention(q, kv, kv, chunk_size=0)
    with pytest.raises(ValueError, match="larger than chunk_size=3"):
        decode_attention(q, kv, kv, jnp.array([4]), chunk_size=3)
    with pytest.raises(ValueError, match="bfloat16 but rows are float32"):
        grouped_matmul(rows, weights.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match="no implementation 'warp'"):
        grouped_swiglu(rows, weights, weights, sizes, implementation="warp")
