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
from pallas_kernels.quantized import DTYPES as QUANTIZED
from pallas_kernels.quantized import QuantizedArray, quantize
from pallas_kernels.shapes import TEXT_SHAPES
from tests.pallas_kernels.helpers import LIMITS, assert_close, normal, relative_error

pytestmark = pytest.mark.usefixtures("no_races")

OPS = {"grouped_matmul": (grouped_matmul, 1), "grouped_swiglu": (grouped_swiglu, 2)}
# "pallas" is what "interpret" runs, compiled: test_grouped_matmul_tpu.py does that.
FAST = [name for name in implementations("grouped_matmul") if name not in ("reference", "pallas")]
DTYPES = list(LIMITS)
NANO = TEXT_SHAPES["nano-scout"]

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

# Interpreted kernels take seconds to compile for each number of rows: in bfloat16 only the most frequent.
IMPLEMENTED = [
    pytest.param(implementation, dtype, case, id=f"{implementation}-{dtype.__name__}-{case}")
    for implementation in FAST
    for dtype in DTYPES
    for case, (group_sizes, rest) in GROUP_SIZES.items()
    if implementation != "interpret" or dtype == jnp.float32 or sum(group_sizes) + rest == 168
]


@functools.partial(jax.jit, static_argnames=("op", "implementation"))
def value_and_gradients(op, implementation, rows, weights, group_sizes, d_out, group_offset=None):
    static = dict(group_sizes_E=group_sizes, group_offset=group_offset, implementation=implementation)
    if isinstance(weights[0], QuantizedArray):
        out, backward = jax.vjp(lambda rows: OPS[op][0](rows, *weights, **static), rows)
    else:
        out, backward = jax.vjp(functools.partial(OPS[op][0], **static), rows, *weights)
    return out, *backward(d_out)


def inputs(op, num_rows, group_sizes, dtype, D=NANO.hidden_size, F=NANO.intermediate_size):
    E = len(group_sizes)
    rows, d_out, *weights = normal(0, (num_rows, D), (num_rows, F), *[(E, D, F)] * OPS[op][1], dtype=dtype)
    return rows, weights, jnp.array(group_sizes), d_out


@pytest.mark.parametrize(("implementation", "dtype", "case"), IMPLEMENTED)
@pytest.mark.parametrize("op", OPS)
def test_equals_reference(op, implementation, dtype, case):
    group_sizes, rest = GROUP_SIZES[case]
    arguments = inputs(op, sum(group_sizes) + rest, group_sizes, dtype)
    results = value_and_gradients(op, implementation, *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), dtype)


@pytest.mark.parametrize(("op", "D", "F"), [("grouped_matmul", 160, 96), ("grouped_swiglu", 64, 480)])
def test_several_tiles_of_everything(op, D, F):
    """Interpreted: three strips of rows; two tiles along D, four along F, shared by two cores."""
    arguments = inputs(op, 168, [37, 0, 66, 65], jnp.float32, D, F)
    results = value_and_gradients(op, "interpret", *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), jnp.float32)


def check_any_group_sizes(implementation, op, data):
    num_rows, num_groups = 90, 6
    cuts = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=num_groups, max_size=num_groups)))
    arguments = inputs(op, num_rows, np.diff(cuts, prepend=0).tolist(), jnp.float32)
    results = value_and_gradients(op, implementation, *arguments)
    assert_close(results, value_and_gradients(op, "reference", *arguments), jnp.float32)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_group_sizes(op, data):
    check_any_group_sizes("xla", op, data)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_group_sizes_interpreted(op, data):
    check_any_group_sizes("interpret", op, data)


@pytest.mark.parametrize(
    ("op", "dtype", "group_size"),
    [
        ("grouped_matmul", jnp.int8, None),
        ("grouped_matmul", jnp.int8, 128),
        ("grouped_matmul", jnp.int4, None),
        ("grouped_matmul", jnp.float8_e4m3fn, None),
        ("grouped_swiglu", jnp.int8, None),
        ("grouped_swiglu", jnp.int4, 128),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("implementation", FAST)
def test_quantized_weights_equal_dequantized_ones(implementation, op, dtype, group_size):
    rows, weights, group_sizes, d_out = inputs(op, 70, [23, 0, 35, 9], jnp.bfloat16, D=256, F=160)
    quantized = [quantize(weight, dtype, axis=1, group_size=group_size) for weight in weights]
    results = value_and_gradients(op, implementation, rows, quantized, group_sizes, d_out)
    dequantized = [weight.dequantize(jnp.float32) for weight in quantized]
    expected = value_and_gradients(
        op, "reference", rows.astype(jnp.float32), dequantized, group_sizes, d_out.astype(jnp.float32)
    )
    assert_close(results, [array.astype(jnp.bfloat16) for array in expected[:2]], jnp.bfloat16)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", [*FAST, "reference"])
def test_shards_of_experts_add_up_to_the_whole(implementation, op):
    """A shard computes its own experts' rows, zeros elsewhere, whatever the other rows hold."""
    rows, weights, group_sizes, d_out = inputs(op, 100, [30, 5, 0, 41, 17, 0], jnp.float32)
    whole = value_and_gradients(op, "reference", rows, weights, group_sizes, d_out)
    ends, parts = np.cumsum([0, 30, 5, 0, 41, 17, 0]), []
    for first in (0, 2, 4):
        own = (np.arange(100) >= ends[first]) & (np.arange(100) < ends[first + 2])
        poisoned, d_poisoned = (jnp.where(own[:, None], array, jnp.nan) for array in (rows, d_out))
        held = [weight[first : first + 2] for weight in weights]
        part = value_and_gradients(op, implementation, poisoned, held, group_sizes, d_poisoned, jnp.int32(first))
        assert not part[0][~own].any()
        parts.append(part)
    out, d_rows, *d_weights = zip(*parts, strict=True)
    assert_close([sum(out), sum(d_rows), *map(jnp.concatenate, d_weights)], whole, jnp.float32)


@pytest.mark.parametrize("implementation", FAST)
def test_shards_of_experts_under_shard_map(implementation):
    rows, (weights,), group_sizes, _ = inputs("grouped_matmul", 40, [10, 5, 0, 20], jnp.float32)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(rows, weights, group_sizes):
        first = jax.lax.axis_index("expert") * weights.shape[0]
        out = grouped_matmul(rows, weights, group_sizes, group_offset=first, implementation=implementation)
        return jax.lax.psum(out, "expert")

    specs = (jax.P(), jax.P("expert"), jax.P())
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False))
    expected = grouped_matmul(rows, weights, group_sizes, implementation="reference")
    assert_close([sharded(rows, weights, group_sizes)], [expected], jnp.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", [*FAST, "reference"])
def test_rows_of_nobody_may_hold_anything(implementation, op):
    rows, weights, group_sizes, d_out = inputs(op, 168, [10, 3, 0, 9], jnp.float32)
    poisoned = rows.at[22:].set(jnp.nan), weights, group_sizes, d_out.at[22:].set(jnp.nan)
    results = value_and_gradients(op, implementation, *poisoned)
    expected = value_and_gradients(op, implementation, rows, weights, group_sizes, d_out)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not results[0][22:].any()


@pytest.mark.parametrize("implementation", [*FAST, "reference"])
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


def test_arguments_that_do_not_fit_are_refused():
    rows, weights, sizes = jnp.ones((4, 64)), jnp.ones((2, 64, 96)), jnp.array([1, 3])
    quantized = quantize(weights, jnp.int8, axis=1)
    with pytest.raises(ValueError, match=r"must be \[2, 64, F\]"):
        grouped_matmul(rows, weights[:1], sizes)
    with pytest.raises(ValueError, match=r"must be \[at most 2, 64, F\]"):
        grouped_matmul(rows, jnp.ones((3, 64, 96)), sizes, group_offset=0)
    with pytest.raises(ValueError, match="gate and up differ"):
        grouped_swiglu(rows, weights, quantized, sizes)
    with pytest.raises(ValueError, match=r"scales of shape \(2, 5, 96\); expected \[2, G, 96\], G | 64"):
        grouped_matmul(rows, QuantizedArray(quantized.values, jnp.ones((2, 5, 96))), sizes)


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


@pytest.mark.parametrize("dtype", [*DTYPES, *QUANTIZED], ids=lambda dtype: dtype.__name__)
def test_weights_are_not_copied(dtype):
    """Temporary memory stays far below the stacked weights, whatever their dtype (see `slices.py`)."""
    weights = jax.ShapeDtypeStruct((64, 64, 96), dtype)
    if dtype in QUANTIZED:
        weights = QuantizedArray(weights, jax.ShapeDtypeStruct((64, 1, 96), jnp.float32))
    rows = jax.ShapeDtypeStruct((64, 64), jnp.float32 if dtype in QUANTIZED else dtype)
    compiled = jax.jit(grouped_swiglu).lower(rows, weights, weights, jax.ShapeDtypeStruct((64,), "i")).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * 64 * 64 * 96 * jnp.dtype(dtype).itemsize
