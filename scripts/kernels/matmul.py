"""Routed expert matmuls: ours, jax's megablox and tokamax's descendant of it."""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cases import NUM_CORES, Case, Count, Program, array, moved
from kernels.dumps import Kernel
from pallas_kernels.grouped_matmul import tiles, tpu
from pallas_kernels.grouped_matmul.finish import itself, swiglu
from pallas_kernels.grouped_matmul.groups import Groups, local_groups
from pallas_kernels.quantized import QuantizedArray
from pallas_kernels.shapes import TEXT_SHAPES

SCOUT, MAVERICK = TEXT_SHAPES["scout"], TEXT_SHAPES["maverick"]
UP = SCOUT.hidden_size, SCOUT.intermediate_size
DOWN = UP[::-1]

Maker = Callable[[str], Program]


def parts(kernel: Kernel) -> list[int]:
    """Returns the bundles of each part that runs a number of times of its own.

    The first is the grid's loop without the others: loops inside it, and its branches that multiply.
    """
    grid, *inner = kernel.loops
    inside = {at for loop in inner for at in loop}
    branches = [s for s in kernel.stretches() if s.start in grid and s.start not in inside and kernel.products(s)]
    rest = len(set(grid) - inside - {at for branch in branches for at in branch})
    return [rest, *(len(part) for part in sorted([*inner, *branches], key=lambda part: part.start))]


def total_bundles(kernel: Kernel, trips: list[int]) -> int:
    """Returns the bundles of all parts, each as often as it runs. Branches that do not multiply count as taken."""
    return int(sum(size * count for size, count in zip(parts(kernel), trips, strict=True)))


def routed_groups(num_rows: int, num_groups: int) -> Groups:
    """Returns the groups of `num_rows` rows that choose theirs at random."""
    choices = np.random.default_rng(0).integers(0, num_groups, num_rows)
    end = np.cumsum(np.bincount(choices, minlength=num_groups)).astype(np.int32)
    return Groups(np.concatenate([[0], end[:-1]]).astype(np.int32), end)


def blocks_of_steps(groups: Groups, steps: tpu.Steps | tpu.OuterSteps, strip: int, block: int) -> np.ndarray:
    """Returns how many blocks of rows each step computes."""
    first = np.maximum(groups.start_e[steps.group] - steps.strip * strip, 0)
    end = np.minimum(groups.end_e[steps.group] - steps.strip * strip, strip)
    return np.where(end > first, -(-(end - tiles.round_down(first, tiles.ALIGNMENT)) // block), 0)


def ours(num_rows: int, num_groups: int, shape=UP, num_weights=1, bits=16, num_scales=1, transposed=False) -> Maker:
    """grouped_matmul, grouped_swiglu (two weights), or the gradient of the first to its rows (transposed)."""

    def make(chip: str) -> Program:
        (depth, width), e, num_cores = shape, num_groups, NUM_CORES[chip]
        groups = routed_groups(num_rows, e)
        rows = [array(num_rows, depth)]
        stored = (e, width, depth) if transposed else (e, depth, width)
        weights = [array(*stored, dtype={16: jnp.bfloat16, 8: jnp.int8, 4: jnp.int4}[bits])] * num_weights
        if bits < 16:
            scales = array(e, num_scales, stored[2], dtype=jnp.float32)
            weights = [QuantizedArray(weight, scales) for weight in weights]

        t = tpu.row_tiles_for(rows, weights, e, transposed, num_results=1)
        num_cols = -(-width // t.cols) // num_cores
        steps = _listed(tpu.list_steps, groups, num_rows, t.strip, num_cols)
        num_small, big = blocks_of_steps(groups, steps, t.strip, t.small), t.big // t.small
        trips = [len(steps.group), (num_small // big).sum(), *([(num_small % big).sum()] if big > 1 else [])]

        scale_bytes = num_scales * stored[2] * 4 if bits < 16 else 0
        matrix_bytes = (depth * width * bits // 8 + scale_bytes) * num_weights
        result_bytes = num_rows * width * 2
        strips = moved(t.strip * depth * 2, steps.rows_strip)
        columns = moved(matrix_bytes * t.cols // width, steps.group, steps.weight_cols)
        used = int((groups.end_e > groups.start_e).sum())
        finish = swiglu if num_weights == 2 else itself

        def function(rows, weights, sizes):
            return tpu.multiply(rows, weights, local_groups(sizes, None, e), e, finish, transposed)

        def count(kernel: Kernel) -> Count:
            return Count(
                total_bundles(kernel, trips),
                result_bytes + num_cores * (strips + columns),
                result_bytes + num_rows * depth * 2 + used * matrix_bytes,
                2 * int(num_small.sum()) * t.small * depth * t.cols * num_cores * num_weights,
                2 * num_rows * depth * width * num_weights,
            )

        return Program(function, [rows, weights, array(e, dtype=jnp.int32)], (), count)

    return make


def ours_outer(num_rows: int, num_groups: int, shape=UP) -> Maker:
    """The gradient of grouped_matmul to its weights."""

    def make(chip: str) -> Program:
        (depth, width), e, num_cores = shape, num_groups, NUM_CORES[chip]
        groups = routed_groups(num_rows, e)
        t = tiles.outer_tiles(num_rows, e, depth, width, itemsize=2)
        steps = _listed(tpu.list_outer_steps, groups, num_rows, t.strip)
        num_blocks = int(blocks_of_steps(groups, steps, t.strip, t.big).sum())
        num_tiles = -(-depth // t.depth) * -(-width // t.cols)
        trips = [num_tiles * len(steps.group) // num_cores, num_tiles * num_blocks // num_cores]
        result_bytes = e * depth * width * 2

        def function(rows, others, sizes):
            return tpu.outer_products(rows, others, local_groups(sizes, None, e), e)

        def count(kernel: Kernel) -> Count:
            return Count(
                total_bundles(kernel, trips),
                result_bytes + moved(t.strip * (t.depth + t.cols) * 2, steps.strip) * num_tiles,
                result_bytes + num_rows * (depth + width) * 2,
                2 * num_tiles * num_blocks * t.big * t.depth * t.cols,
                2 * num_rows * depth * width,
            )

        rows, others = (array(num_rows, size) for size in shape)
        return Program(function, [rows, others, array(e, dtype=jnp.int32)], (), count)

    return make


def _listed(list_steps: Callable, groups: Groups, *arguments: int) -> tpu.Steps | tpu.OuterSteps:
    steps, num_steps = jax.tree.map(np.asarray, list_steps(jax.tree.map(jnp.asarray, groups), *arguments))
    return jax.tree.map(lambda table: table[:num_steps], steps)


def megablox(
    num_rows: int,
    num_groups: int,
    tiling: tuple[int, int, int],
    shape=UP,
    transposed=False,
    outer=False,
    tokamax=False,
    v5_tiling: tuple[int, int, int] | None = None,
) -> Maker:
    """jax's megablox, or tokamax's: gmm, or tgmm (outer).

    Neither asks for fast memory, so tiles must fit what the compiler gives unasked: on v5e and v5p less than elsewhere.
    """

    def make(chip: str) -> Program:
        (depth, width), e = shape, num_groups
        tiles_of_chip = v5_tiling if v5_tiling and chip in ("v5e", "v5p") else tiling
        rows_tile, depth_tile, width_tile = tiles_of_chip
        num_cores = 1 if tokamax else NUM_CORES[chip]  # a pipeline inside of one step stays on its core
        groups = routed_groups(num_rows, e)
        gmm, tgmm = _tokamax_kernels() if tokamax else _megablox_kernels()
        (_, group, strip), num_active = _megablox().make_group_metadata(
            group_sizes=jnp.asarray(groups.end_e - groups.start_e), m=num_rows, tm=rows_tile,
            start_group=jnp.int32(0), num_nonzero_groups=e, visit_empty_groups=outer,
        )  # fmt: skip
        group, strip = (np.asarray(table)[: int(num_active)] for table in (group, strip))
        tall, wide = -(-depth // depth_tile), -(-width // width_tile)
        row_bytes, result_bytes, matrix_bytes = num_rows * depth * 2, num_rows * width * 2, depth * width * 2
        flops = 2 * tall * wide * len(group) * rows_tile * depth_tile * width_tile
        sizes_E = array(e, dtype=jnp.int32)

        def count_outer(kernel: Kernel) -> Count:
            # The grid, and its branch that multiplies.
            num_steps = tall * wide * len(group) // num_cores
            return Count(
                total_bundles(kernel, [num_steps, num_steps]),
                moved(rows_tile * (depth_tile + width_tile) * 2, strip) * tall * wide + e * matrix_bytes,
                row_bytes + result_bytes + e * matrix_bytes,
                flops,
                2 * num_rows * depth * width,
            )

        def count(kernel: Kernel) -> Count:
            n, visit, k = (index.ravel() for index in np.indices((wide, len(group), tall)))
            # The grid, and its two branches that multiply: the last step along the contracted axis, the others.
            num_sums = wide * len(group) // num_cores
            trips = [num_sums * tall, num_sums, *([num_sums * (tall - 1)] if tall > 1 else [])]
            return Count(
                total_bundles(kernel, trips),
                moved(rows_tile * depth_tile * 2, strip[visit], k)
                + moved(depth_tile * width_tile * 2, group[visit], k, n)
                + result_bytes,
                row_bytes + result_bytes + int((groups.end_e > groups.start_e).sum()) * matrix_bytes,
                flops,
                2 * num_rows * depth * width,
            )

        if outer:

            def function(rows, others, sizes):
                return tgmm(rows.T, others, sizes, tiling=tiles_of_chip)

            return Program(function, [array(num_rows, depth), array(num_rows, width), sizes_E], (), count_outer)

        def function(rows, weights, sizes):
            return gmm(rows, weights, sizes, tiling=tiles_of_chip, transpose_rhs=transposed)

        weights = array(e, width, depth) if transposed else array(e, depth, width)
        return Program(function, [array(num_rows, depth), weights, sizes_E], (), count)

    return make


def _megablox():
    # The package's attribute of that name is a function.
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _megablox_kernels() -> tuple[Callable, Callable]:
    from jax.experimental.pallas.ops.tpu.megablox import common

    common.tpu_kind = lambda: "TPU v6"  # it asks the machine's own device, not the one compiled for
    return (functools.partial(f, preferred_element_type=jnp.bfloat16) for f in (_megablox().gmm, _megablox().tgmm))


def _tokamax_kernels() -> tuple[Callable, Callable]:
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as backend

    options = {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32, "out_dtype": jnp.bfloat16}
    return (functools.partial(f, **options) for f in (backend.gmm, backend.tgmm))


USUAL = 512, 1024, 1024
"""Tiles of megablox that its users take."""
WHOLE = 128, 5120, 512
"""Whole columns of weights, which are then read once for each group. Of tokamax too: its tables have the like for other
shapes, and for these nothing, which means 128 x 128 x 128."""


def _case(op: str, shape: str, **programs: Maker) -> Case:
    return Case(op, shape, {who.replace("_", " "): program for who, program in programs.items()})


def _rows(num_rows: int, shape=SCOUT, what: str = "") -> str:
    return f"{num_rows} rows, {shape.num_experts} x {shape.hidden_size} x {shape.intermediate_size}{what}"


CASES = {
    "matmul-prefill": _case(
        "grouped_matmul",
        _rows(8192),
        ours=ours(8192, 16),
        megablox=megablox(8192, 16, USUAL),
        megablox_whole_columns=megablox(8192, 16, WHOLE),
        tokamax=megablox(8192, 16, WHOLE, tokamax=True),
    ),
    "matmul-prefill-maverick": _case(
        "grouped_matmul",
        _rows(8192, MAVERICK),
        ours=ours(8192, 128),
        megablox=megablox(8192, 128, (128, 1024, 1024)),
        megablox_whole_columns=megablox(8192, 128, WHOLE),
        tokamax=megablox(8192, 128, WHOLE, tokamax=True),
    ),
    "matmul-decode": _case(
        "grouped_matmul",
        _rows(64),
        ours=ours(64, 16),
        megablox=megablox(64, 16, (64, 1024, 1024)),
        tokamax=megablox(64, 16, (64, 5120, 512), tokamax=True),
    ),
    "matmul-training": _case(
        "grouped_matmul",
        _rows(16384),
        ours=ours(16384, 16),
        megablox=megablox(16384, 16, USUAL),
        tokamax=megablox(16384, 16, WHOLE, tokamax=True),
    ),
    "matmul-one-expert": _case(
        "grouped_matmul",
        "16384 rows, 1 x 5120 x 8192",
        ours=ours(16384, 1),
        megablox=megablox(16384, 1, USUAL),
    ),
    "matmul-rows-gradient": _case(
        "grouped_matmul, gradient to rows",
        _rows(16384),
        ours=ours(16384, 16, DOWN, transposed=True),
        megablox=megablox(16384, 16, USUAL, DOWN, transposed=True),
        tokamax=megablox(16384, 16, (512, 2048, 1024), DOWN, transposed=True, tokamax=True, v5_tiling=USUAL),
    ),
    "matmul-weights-gradient": _case(
        "grouped_matmul, gradient to weights",
        _rows(16384),
        ours=ours_outer(16384, 16),
        megablox=megablox(16384, 16, USUAL, outer=True),
        tokamax=megablox(16384, 16, (512, 1024, 2048), outer=True, tokamax=True, v5_tiling=USUAL),
    ),
    "swiglu-prefill": _case("grouped_swiglu", _rows(8192), ours=ours(8192, 16, num_weights=2)),
    "matmul-prefill-int8": _case("grouped_matmul", _rows(8192, what=" int8"), ours=ours(8192, 16, bits=8)),
    "matmul-prefill-int4": _case(
        "grouped_matmul", _rows(8192, what=" int4, groups of 128"), ours=ours(8192, 16, bits=4, num_scales=40)
    ),
    "matmul-decode-int8": _case("grouped_matmul", _rows(64, what=" int8"), ours=ours(64, 16, bits=8)),
    "matmul-decode-int4": _case(
        "grouped_matmul", _rows(64, what=" int4, groups of 128"), ours=ours(64, 16, bits=4, num_scales=40)
    ),
}
