"""Every implementation of the routed expert matmuls, forward and gradients, against the specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.dispatch import implementations
from pallas_kernels.grouped_matmul.xla import block_counts, block_sizes
from pallas_kernels.shapes import TEXT_SHAPES
from tests.pallas_kernels.helpers import LIMITS, assert_close, normal, relative_error

OPS = {"grouped_matmul": (grouped_matmul, 1), "grouped_swiglu": (grouped_swiglu, 2)}
FAST = [name for name in implementations("grouped_matmul") if name != "reference"]
DTYPES = list(LIMITS)

# Rows of each group; the number of rows is the sum plus what is said after the name.
GROUP_SIZES = {
    "uneven": ([37, 0, 130, 1], 0),
    "one takes everything": ([0, 0, 168, 0], 0),
    "some rows are nobody's": ([10, 3, 0, 9], 146),
    "all rows are nobody's": ([0, 0, 0, 0], 168),
    "multiples of the block": ([32, 64, 0, 72], 0),
    "one row": ([0, 1, 0, 0], 0),
    "fewer rows than groups": ([1, 0, 1, 1], 0),
}


@functools.partial(jax.jit, static_argnames=("op", "implementation"))
def value_and_gradients(op, implementation, rows, weights, group_sizes, d_out):
    function = functools.partial(OPS[op][0], group_sizes_E=group_sizes, implementation=implementation)
    out, backward = jax.vjp(function, rows, *weights)
    return out, *backward(d_out)


def inputs(op, num_rows, group_sizes, dtype, seed=0):
    shape = TEXT_SHAPES["nano-scout"]
    D, F, E = shape.hidden_size, shape.intermediate_size, len(group_sizes)
    rows, d_out, *weights = normal(seed, (num_rows, D), (num_rows, F), *[(E, D, F)] * OPS[op][1], dtype=dtype)
    return rows, weights, jnp.array(group_sizes), d_out


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES.keys())
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", FAST)
def test_equals_reference(implementation, op, sizes, dtype):
    group_sizes, rest = sizes
    arguments = inputs(op, sum(group_sizes) + rest, group_sizes, dtype)
    results = value_and_gradients(op, implementation, *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_group_sizes(implementation, op, data):
    num_rows, num_groups = 90, 6
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=num_groups, max_size=num_groups)))
    arguments = inputs(op, num_rows, np.diff(cuts, prepend=0).tolist(), jnp.float32)
    results = value_and_gradients(op, implementation, *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), jnp.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", implementations("grouped_matmul"))
def test_rows_of_nobody_may_hold_anything(implementation, op):
    rows, weights, group_sizes, d_out = inputs(op, 168, [10, 3, 0, 9], jnp.float32)
    poisoned = rows.at[22:].set(jnp.nan), weights, group_sizes, d_out
    results = value_and_gradients(op, implementation, *poisoned)
    expected = value_and_gradients(op, implementation, rows, weights, group_sizes, d_out)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not results[0][22:].any()


@pytest.mark.parametrize("implementation", implementations("grouped_matmul"))
def test_equals_a_loop_over_the_rows(implementation):
    group_sizes = [3, 0, 5, 2]
    rows, (gate, up), sizes, _ = inputs("grouped_swiglu", 12, group_sizes, jnp.float32)
    owners = np.repeat(np.arange(4), group_sizes)
    product, swiglu = np.zeros((12, gate.shape[2])), np.zeros((12, gate.shape[2]))
    for row, owner in enumerate(owners):
        g, u = (np.float64(rows[row]) @ np.float64(w[owner]) for w in (gate, up))
        product[row], swiglu[row] = g, g / (1 + np.exp(-g)) * u
    assert relative_error(grouped_matmul(rows, gate, sizes, implementation=implementation), product) <= 1e-6
    assert relative_error(grouped_swiglu(rows, gate, up, sizes, implementation=implementation), swiglu) <= 1e-6


def test_blocks_hold_all_rows_and_little_else():
    group_sizes = jnp.arange(600)
    num_big, num_small = block_counts(group_sizes, big=128, small=32)
    covered = num_big * 128 + num_small * 32
    assert (covered >= group_sizes).all()
    assert (covered - group_sizes).max() < 64
    assert (num_small <= 2).all()
    assert num_big[0] == num_small[0] == 0


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "dtype", "expected"),
    [
        (2048, 16, jnp.float32, (128, 32)),
        (8192, 16, jnp.float32, (128, 32)),
        (2048, 128, jnp.float32, (16, 4)),
        (8, 16, jnp.float32, (4, 1)),
        (8, 16, jnp.bfloat16, (4, 2)),
        (1, 128, jnp.float32, (1, 1)),
    ],
)
def test_block_sizes_follow_the_mean_group(num_rows, num_groups, dtype, expected):
    assert block_sizes(num_rows, num_groups, jnp.dtype(dtype)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_weights_are_not_copied(dtype):
    """Temporary memory stays far below the stacked weights, in bfloat16 too (see `slices.py`)."""
    rows, weights, sizes = (
        jax.ShapeDtypeStruct(s, d) for s, d in (((64, 64), dtype), ((64, 64, 96), dtype), ((64,), "i"))
    )
    compiled = jax.jit(grouped_swiglu).lower(rows, weights, weights, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 64 * 64 * 96 * jnp.dtype(dtype).itemsize
