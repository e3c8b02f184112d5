"""The Mosaic kernels of the routed expert matmuls: which steps they take, and that real TPUs' compiler takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.topology import CHIPS, compile_ahead, one_chip
from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.dispatch import implementations
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.groups import Groups
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.shapes import TEXT_SHAPES

NUM_ROWS, STRIP, NUM_GROUPS, NUM_COLS = 70, 16, 5, 2


@st.composite
def some_groups(draw):
    """Groups that follow each other; rows before the first and after the last may be nobody's."""
    cuts = sorted(draw(st.lists(st.integers(0, NUM_ROWS), min_size=NUM_GROUPS + 1, max_size=NUM_GROUPS + 1)))
    return Groups(np.array(cuts[:-1]), np.array(cuts[1:]))


def shared_rows(groups, strip, group):
    return min(groups.end_e[group], (strip + 1) * STRIP) - max(groups.start_e[group], strip * STRIP)


@settings(max_examples=60, deadline=None)
@given(groups=some_groups())
def test_steps_visit_what_exists_and_nothing_else(groups):
    steps, num_steps = jax.jit(tpu.list_steps, static_argnums=(1, 2, 3))(groups, NUM_ROWS, STRIP, NUM_COLS)
    assert num_steps <= len(steps.strip)
    steps = jax.tree.map(lambda table: np.asarray(table)[: int(num_steps)].tolist(), steps)
    expected = []
    for strip in range(5):
        present = [group for group in range(NUM_GROUPS) if shared_rows(groups, strip, group) > 0]
        owned = sum(shared_rows(groups, strip, group) for group in present)
        full = owned == min(NUM_ROWS - strip * STRIP, STRIP)
        for cols in range(NUM_COLS):
            expected += [(strip, cols, group, not full and nth == 0) for nth, group in enumerate(present or [None])]
    visited = [
        (strip, cols, group if shared_rows(groups, strip, group) > 0 else None, bool(clears))
        for strip, cols, group, clears in zip(steps.strip, steps.cols, steps.group, steps.clears, strict=True)
    ]
    assert visited == expected

    # Steps without rows read nothing: their blocks are those of a neighbour.
    reads = list(zip(steps.rows_strip, steps.group, steps.weight_cols, strict=True))
    used = [read for read, (_, _, group, _) in zip(reads, visited, strict=True) if group is not None]
    assert [read for read, before in zip(reads, [None, *reads], strict=False) if read != before] == (used or reads[:1])
    assert all(read[0] == strip for read, (strip, _, group, _) in zip(reads, visited, strict=True) if group is not None)


@settings(max_examples=60, deadline=None)
@given(groups=some_groups())
def test_outer_steps_visit_every_group(groups):
    steps, num_steps = jax.jit(tpu.list_outer_steps, static_argnums=(1, 2))(groups, NUM_ROWS, STRIP)
    assert num_steps <= len(steps.strip)
    steps = jax.tree.map(lambda table: np.asarray(table)[: int(num_steps)].tolist(), steps)
    visited = list(zip(steps.group, steps.strip, steps.opens, steps.closes, strict=True))
    expected = []
    for group in range(NUM_GROUPS):
        strips = [strip for strip in range(5) if shared_rows(groups, strip, group) > 0]
        strips = strips or [min(int(groups.start_e[group]) // STRIP, 4)]
        expected += [(group, strip, strip == strips[0], strip == strips[-1]) for strip in strips]
    assert visited == expected


SCOUT = TEXT_SHAPES["scout"]
WIDE, TALL = (SCOUT.hidden_size, SCOUT.intermediate_size), (SCOUT.intermediate_size, SCOUT.hidden_size)
BF16 = (jnp.bfloat16, None)
GRADIENT = "gradient"

# Operation, rows, all experts, experts held, their matrices, (dtype of the weights, group size of their scales).
COMPILED = {
    "Scout prefill, gate and up": (grouped_swiglu, 8192, 16, 16, WIDE, BF16),
    "Scout prefill, down": (grouped_matmul, 8192, 16, 16, TALL, BF16),
    "Scout training, gate and up": (grouped_swiglu, 16384, 16, 4, WIDE, BF16, GRADIENT),
    "Scout training, down": (grouped_matmul, 16384, 16, 16, TALL, BF16, GRADIENT),
    "Scout training, one expert": (grouped_matmul, 16384, 16, 1, WIDE, BF16, GRADIENT),
    "Scout decode": (grouped_swiglu, 64, 16, 16, WIDE, BF16),
    "Maverick prefill": (grouped_matmul, 8192, 128, 128, TALL, BF16),
    "Maverick decode": (grouped_swiglu, 64, 128, 16, WIDE, BF16),
    "Maverick decode, one row": (grouped_matmul, 1, 128, 128, TALL, BF16),
    "Maverick decode in fp8": (grouped_matmul, 256, 128, 128, TALL, (jnp.float8_e4m3fn, None)),
    "Scout prefill in int8": (grouped_swiglu, 8192, 16, 16, WIDE, (jnp.int8, None)),
    "Scout decode in int4": (grouped_matmul, 64, 16, 16, TALL, (jnp.int4, 128)),
    "Scout rows' gradient in int4": (grouped_swiglu, 512, 16, 16, WIDE, (jnp.int4, 128), GRADIENT),
    "Maverick rows' gradient in int8": (grouped_matmul, 8192, 128, 8, TALL, (jnp.int8, None), GRADIENT),
}


def compile_call(chip, op, num_rows, num_experts, held, matrix, scheme, gradient=None, dtype=jnp.bfloat16):
    (depth, width), (weights_dtype, group_size) = matrix, scheme
    rows, d_out = (jax.ShapeDtypeStruct((num_rows, size), dtype) for size in matrix)
    weights = jax.ShapeDtypeStruct((held, depth, width), weights_dtype)
    quantized = weights_dtype != dtype
    if quantized:
        num_scales = 1 if group_size is None else depth // group_size
        weights = QuantizedArray(weights, jax.ShapeDtypeStruct((held, num_scales, width), jnp.float32))
    weights = [weights] * (2 if op is grouped_swiglu else 1)
    sizes, offset = jax.ShapeDtypeStruct((num_experts,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def forward(rows, weights, sizes, offset):
        return op(rows, *weights, sizes, offset, implementation="pallas")

    def gradients(rows, weights, sizes, offset, d_out):
        if quantized:
            return jax.vjp(lambda rows: forward(rows, weights, sizes, offset), rows)[1](d_out)
        return jax.vjp(functools.partial(forward, sizes=sizes, offset=offset), rows, weights)[1](d_out)

    function, more = (gradients, [d_out]) if gradient else (forward, [])
    return compile_ahead(function, one_chip(chip), rows, weights, sizes, offset, *more)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_a_real_tpu(chip, case):
    op, *_, scheme = [part for part in COMPILED[case] if part is not GRADIENT]
    num_kernels = 1
    if GRADIENT in COMPILED[case]:  # to rows and weights; a product's own value is not needed for them
        num_weights = 0 if scheme is not BF16 else 2 if op is grouped_swiglu else 1
        num_kernels = 1 + num_weights + (op is grouped_swiglu)
    compiled = compile_call(chip, *COMPILED[case])
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == num_kernels


@pytest.mark.tpu_aot
def test_compiles_in_float32_where_memory_is_tightest():
    compile_call("v5p", grouped_matmul, 1024, 16, 1, TALL, (jnp.float32, None), GRADIENT, jnp.float32)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("matrix", [(64, 96), (100, 72), (300, 1100)])
def test_compiles_for_sizes_that_no_tile_divides(matrix):
    compile_call("v6e", grouped_swiglu, 203, 4, 4, matrix, BF16, GRADIENT)
    compile_call("v6e", grouped_matmul, 203, 4, 4, matrix, (jnp.int8, None), GRADIENT)


def test_pallas_says_why_it_cannot_serve_a_call():
    rows, weights, sizes = jnp.ones((4, 64)), jnp.ones((2, 64, 96)), jnp.array([1, 3])
    half_rows, half_weights = rows.astype(jnp.float16), weights.astype(jnp.float16)
    quantized = QuantizedArray(weights.astype(jnp.int8), jnp.ones((2, 2, 96)))
    high = jnp.ones((2, 1 << 20, 8)), jnp.ones((4, 1 << 20))
    with pytest.raises(ValueError, match="needs a TPU, this is a cpu"):
        grouped_matmul(rows, weights, sizes, implementation="pallas")
    with pytest.raises(ValueError, match="float16, not float32 or bfloat16"):
        grouped_matmul(half_rows, half_weights, sizes, implementation="interpret")
    with pytest.raises(ValueError, match="scales for groups of 32 numbers"):
        grouped_matmul(rows, quantized, sizes, implementation="interpret")
    with pytest.raises(ValueError, match="do not fit in fast memory"):
        grouped_matmul(high[1], high[0], sizes, implementation="interpret")
    with pytest.raises(ValueError, match="nothing to multiply"):
        grouped_matmul(rows[:0], weights, sizes, implementation="interpret")


def test_auto_never_interprets():
    names = implementations("grouped_swiglu")
    assert names.index("xla") < names.index("interpret")  # xla serves every call
