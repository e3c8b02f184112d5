"""Counts what the TPU compiler makes of our Pallas kernels and of jax's own, for chips that are not here.

    python scripts/count_tpu_kernels.py                            all cases for v6e
    python scripts/count_tpu_kernels.py gmm-prefill megablox-prefill --chips v5e v5p v6e tpu7x

Each case is compiled alone, in a process of its own, with libtpu's dumps switched on. Printed per kernel: fast memory,
spilled registers, and for each loop (first the grid's; a branch of it that multiplies counts as a loop of its own) its
VLIW bundles, how often it runs for the case's inputs, and how full the matrix units are. A bundle is one cycle unless
the core waits, for memory or for a matrix unit that is still busy: the total is a lower bound on cycles, and no time.
Branches that do not multiply count as taken. Where two cores share the work, bundles are those of one.
Bytes are what the kernel's index maps make it move, beside every operand and result once.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox import common as megablox_common

from l4jax.topology import compile_ahead, one_chip
from pallas_kernels.grouped_matmul import tiles, tpu
from pallas_kernels.grouped_matmul.groups import Groups, local_groups
from pallas_kernels.quantized import QuantizedArray

# The package's attribute of that name is a function.
megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


class Case(NamedTuple):
    """One program that holds the kernel to count.

    Attributes:
        function: what is compiled.
        arguments: abstract arguments, trees of `jax.ShapeDtypeStruct`.
        trips: how often each `Part` of the kernel runs in all, in the order of the program (the grid first).
        bytes_moved: what the kernel moves between HBM and fast memory.
        bytes_ideal: every operand and result once, as far as it is needed.
    """

    function: Callable
    arguments: list
    trips: list[int]
    bytes_moved: int
    bytes_ideal: int


class Part(NamedTuple):
    """A loop of a compiled kernel, without the loops inside it; or a branch of the grid's loop that multiplies."""

    first: int
    """Its first bundle."""
    bundles: int
    units: dict[str, int]
    """Uses of each unit."""


def compile_case(name: str, chip: str) -> Case:
    mesh = one_chip(chip)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tiles depend on the chip
        case = CASES[name]()
    compile_ahead(case.function, mesh, *case.arguments)
    return case


def read_parts(bundles: str, utilization: str) -> list[Part]:
    """Returns the parts of a kernel, from two of the compiler's dumps."""
    header, table = utilization.split("== UTILIZATION:\n")
    names = header.split("\n")[1].split(", ")
    uses = [dict(zip(names, map(int, line.split()), strict=True)) for line in table.strip().split("\n")]
    lines = re.findall(r"^ *(?:0x[0-9a-f]+|0) *(\w\w)? *: *(>*) *\{(.*)$", bundles, re.MULTILINE)
    tags, depths, texts = zip(*lines, strict=True)
    depths = [len(depth) for depth in depths]
    # A loop begins at its label and ends with the last bundle that is marked as deep as it: a few within are not.
    loops = [range(at, _end_of_loop(at, tags, depths)) for at, tag in enumerate(tags) if tag == "LB"]
    parts = []
    for loop in loops:
        inner = {at for other in loops if other.start > loop.start and other.stop <= loop.stop for at in other}
        own = [at for at in loop if at not in inner]
        blocks: list[list[int]] = [[]]
        for at in own:
            if tags[at] or (blocks[-1] and blocks[-1][-1] != at - 1):
                blocks.append([])
            blocks[-1].append(at)
            if "sbr.rel" in texts[at]:
                blocks.append([])
        branches = [block for block in blocks if depths[loop.start] == 1 and any(uses[at]["MXU"] for at in block)]
        rest = sorted(set(own) - {at for block in branches for at in block})
        for block in (rest, *branches):
            units = {name: sum(uses[at][name] for at in block) for name in names}
            parts.append(Part(block[0], len(block), units))
    return sorted(parts, key=lambda part: part.first)


def _end_of_loop(start: int, tags: tuple[str, ...], depths: list[int]) -> int:
    depth, end = depths[start], start + 1
    for at in range(start + 1, len(tags)):
        if tags[at] == "LB" and depths[at] <= depth:
            break
        if depths[at] >= depth:
            end = at + 1
    return end


def report(case: Case, dumps: Path) -> None:
    mib = 1 << 20
    for path in dumps.glob("*final_bundles.txt"):
        text = path.read_text()
        if not re.search(r"entry bundle: \S+ = custom-call", text):
            continue
        kernel = re.sub(r"-\d+-final_bundles.txt", "", path.name)
        (utilization,) = dumps.glob(f"{kernel}-*-final_hlo-static-per-bundle-utilization.txt")
        (original,) = dumps.glob(f"{kernel}-02-original.txt")
        utilization, original = utilization.read_text(), original.read_text()
        num_matrix_units = int(utilization.split("\n")[2].split()[0])
        vmem = sum(int(size, 16) for size in re.findall(r"space=vmem, size = (0x[0-9a-f]+)", original))
        spilled = len(set(re.findall(r"#allocation\d+_spill", text)))
        print(f"  {kernel.split('-', 1)[1]}: {vmem / mib:.1f} MiB of fast memory, {spilled} registers spilled")
        parts = read_parts(text, utilization)
        trips = case.trips if len(case.trips) == len(parts) else [0] * len(parts)
        for part, count in zip(parts, trips, strict=True):
            full = part.units["MXU"] / (part.bundles * num_matrix_units)
            print(f"    {part.bundles:6} bundles x {count:6}, matrix units {full:.0%}")
        total = sum(part.bundles * count for part, count in zip(parts, trips, strict=True))
        print(f"    {total / 1e6:.3f} M bundles" if total else f"    the case lists {len(case.trips)} parts")
    gb = 1e9
    print(f"    {case.bytes_moved / gb:.3f} GB moved, {case.bytes_ideal / gb:.3f} GB at least", flush=True)


def moved(block_bytes: int, *indices) -> int:
    """Returns the bytes of a block that is fetched whenever its indices, arrays over the steps, change."""
    changes = np.stack(indices)[:, 1:] != np.stack(indices)[:, :-1]
    return block_bytes * (1 + int(changes.any(0).sum()))


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


def grouped_case(
    num_rows: int, num_groups: int, shape=(5120, 8192), num_weights=1, bits=16, num_scales=1, transposed=False
) -> Callable[[], Case]:
    """grouped_matmul, grouped_swiglu (two weights), or the gradient of the first to its rows (transposed)."""

    def make() -> Case:
        (depth, width), e = shape, num_groups
        groups = routed_groups(num_rows, e)
        rows = [jax.ShapeDtypeStruct((num_rows, depth), jnp.bfloat16)]
        stored = (e, width, depth) if transposed else (e, depth, width)
        weights = [jax.ShapeDtypeStruct(stored, {16: jnp.bfloat16, 8: jnp.int8, 4: jnp.int4}[bits])] * num_weights
        if bits < 16:
            scales = jax.ShapeDtypeStruct((e, num_scales, stored[2]), jnp.float32)
            weights = [QuantizedArray(weight, scales) for weight in weights]

        t = tpu.row_tiles_for(rows, weights, e, transposed, num_results=1)
        num_cores = tiles.chip().num_cores
        num_cols = -(-width // t.cols) // num_cores
        listed = tpu.list_steps(jax.tree.map(jnp.asarray, groups), num_rows, t.strip, num_cols)
        steps, num_steps = jax.tree.map(np.asarray, listed)
        steps = jax.tree.map(lambda table: table[:num_steps], steps)
        num_small, big = blocks_of_steps(groups, steps, t.strip, t.small), t.big // t.small
        trips = [num_steps, (num_small // big).sum(), *([(num_small % big).sum()] if big > 1 else [])]

        matrix_bytes = depth * width * bits // 8 * num_weights
        row_bytes, result_bytes = num_rows * depth * 2, num_rows * width * 2
        bytes_moved = result_bytes + num_cores * (
            moved(t.strip * depth * 2, steps.rows_strip)
            + moved(matrix_bytes * t.cols // width, steps.group, steps.weight_cols)
        )
        bytes_ideal = row_bytes + result_bytes + (groups.end_e > groups.start_e).sum() * matrix_bytes
        finish = tpu.swiglu if num_weights == 2 else tpu.itself

        def function(rows, weights, sizes):
            return tpu.multiply(rows, weights, local_groups(sizes, None, e), e, finish, transposed)

        return Case(function, [rows, weights, jax.ShapeDtypeStruct((e,), "i")], trips, bytes_moved, bytes_ideal)

    return make


def outer_case(num_rows: int, num_groups: int, shape=(5120, 8192)) -> Callable[[], Case]:
    """The gradient of grouped_matmul to its weights."""

    def make() -> Case:
        (depth, width), e = shape, num_groups
        groups = routed_groups(num_rows, e)
        t = tiles.outer_tiles(num_rows, e, depth, width, itemsize=2)
        listed = tpu.list_outer_steps(jax.tree.map(jnp.asarray, groups), num_rows, t.strip)
        steps, num_steps = jax.tree.map(np.asarray, listed)
        steps = jax.tree.map(lambda table: table[:num_steps], steps)
        num_blocks = blocks_of_steps(groups, steps, t.strip, t.big).sum()
        num_tiles = -(-depth // t.depth) * -(-width // t.cols)
        num_cores = tiles.chip().num_cores
        result_bytes = e * depth * width * 2

        def function(rows, others, sizes):
            return tpu.outer_products(rows, others, local_groups(sizes, None, e), e)

        rows, others = (jax.ShapeDtypeStruct((num_rows, n), jnp.bfloat16) for n in shape)
        return Case(
            function,
            [rows, others, jax.ShapeDtypeStruct((e,), "i")],
            [num_tiles * num_steps // num_cores, num_tiles * num_blocks // num_cores],
            result_bytes + moved(t.strip * (t.depth + t.cols) * 2, steps.strip) * num_tiles,
            result_bytes + num_rows * (depth + width) * 2,
        )

    return make


def megablox_case(
    num_rows: int, num_groups: int, tiling, shape=(5120, 8192), transposed=False, outer=False
) -> Callable[[], Case]:
    """jax's megablox on the same problem: gmm, or tgmm (outer)."""

    def make() -> Case:
        megablox_common.tpu_kind = lambda: "TPU v6"  # it asks the machine's own device, not the one compiled for
        (depth, width), e, (rows_tile, depth_tile, width_tile) = shape, num_groups, tiling
        groups = routed_groups(num_rows, e)
        (_, group, strip), num_active = megablox.make_group_metadata(
            group_sizes=jnp.asarray(groups.end_e - groups.start_e), m=num_rows, tm=rows_tile,
            start_group=jnp.int32(0), num_nonzero_groups=e, visit_empty_groups=outer,
        )  # fmt: skip
        group, strip = (np.asarray(table)[: int(num_active)] for table in (group, strip))
        tall, wide, num_cores = -(-depth // depth_tile), -(-width // width_tile), tiles.chip().num_cores
        rows, others = (jax.ShapeDtypeStruct((num_rows, n), jnp.bfloat16) for n in shape)
        weights = jax.ShapeDtypeStruct((e, width, depth) if transposed else (e, depth, width), jnp.bfloat16)
        sizes_E = jax.ShapeDtypeStruct((e,), jnp.int32)
        row_bytes, result_bytes, matrix_bytes = num_rows * depth * 2, num_rows * width * 2, depth * width * 2

        if outer:

            def function(rows, others, sizes):
                return megablox.tgmm(rows.T, others, sizes, jnp.bfloat16, tiling)

            bytes_moved = moved(rows_tile * (depth_tile + width_tile) * 2, strip) * tall * wide + e * matrix_bytes
            num_steps = tall * wide * len(group) // num_cores
            bytes_ideal = row_bytes + result_bytes + e * matrix_bytes
            return Case(function, [rows, others, sizes_E], [num_steps, num_steps], bytes_moved, bytes_ideal)

        def function(rows, weights, sizes):
            return megablox.gmm(rows, weights, sizes, jnp.bfloat16, tiling, transpose_rhs=transposed)

        n, visit, k = (index.ravel() for index in np.indices((wide, len(group), tall)))
        bytes_moved = (
            moved(rows_tile * depth_tile * 2, strip[visit], k)
            + moved(depth_tile * width_tile * 2, group[visit], k, n)
            + result_bytes
        )
        # The grid, and its two branches that multiply: the last step along the contracted axis, the others.
        num_sums = wide * len(group) // num_cores
        trips = [num_sums * tall, num_sums, *([num_sums * (tall - 1)] if tall > 1 else [])]
        bytes_ideal = row_bytes + result_bytes + (groups.end_e > groups.start_e).sum() * matrix_bytes
        return Case(function, [rows, weights, sizes_E], trips, bytes_moved, bytes_ideal)

    return make


# Scout: 16 experts of 5120 x 8192; Maverick: 128. megablox with the tiles that its users take, and with whole columns
# of weights, which it then reads once.
CASES: dict[str, Callable[[], Case]] = {
    "gmm-prefill": grouped_case(8192, 16),
    "megablox-prefill": megablox_case(8192, 16, (512, 1024, 1024)),
    "megablox-prefill-128-rows": megablox_case(8192, 16, (128, 1024, 1024)),
    "megablox-prefill-whole-columns": megablox_case(8192, 16, (128, 5120, 512)),
    "swiglu-prefill": grouped_case(8192, 16, num_weights=2),
    "gmm-prefill-int8": grouped_case(8192, 16, bits=8),
    "gmm-prefill-int4-groups": grouped_case(8192, 16, bits=4, num_scales=40),
    "gmm-prefill-maverick": grouped_case(8192, 128),
    "megablox-prefill-maverick": megablox_case(8192, 128, (128, 1024, 1024)),
    "gmm-decode": grouped_case(64, 16),
    "megablox-decode": megablox_case(64, 16, (64, 1024, 1024)),
    "gmm-decode-int8": grouped_case(64, 16, bits=8),
    "gmm-decode-int4": grouped_case(64, 16, bits=4),
    "gmm-decode-int4-groups": grouped_case(64, 16, bits=4, num_scales=40),
    "gmm-training": grouped_case(16384, 16),
    "megablox-training": megablox_case(16384, 16, (512, 1024, 1024)),
    "gmm-training-one-expert": grouped_case(16384, 1),
    "megablox-training-one-expert": megablox_case(16384, 1, (512, 1024, 1024)),
    "gmm-rows-gradient": grouped_case(16384, 16, (8192, 5120), transposed=True),
    "megablox-rows-gradient": megablox_case(16384, 16, (512, 1024, 1024), (8192, 5120), transposed=True),
    "gmm-weights-gradient": outer_case(16384, 16),
    "megablox-weights-gradient": megablox_case(16384, 16, (512, 1024, 1024), outer=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--chips", nargs="+", default=["v6e"], help="v5e, v5p, v6e, tpu7x")
    parser.add_argument("--dumps", type=Path, help=argparse.SUPPRESS)  # set for the process of one case
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    if options.dumps:
        print(f"{options.cases[0]} on {options.chips[0]}", flush=True)
        report(compile_case(options.cases[0], options.chips[0]), options.dumps)
        return
    for chip in options.chips:
        for case in options.cases or CASES:
            with tempfile.TemporaryDirectory() as dumps:
                flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
                environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
                command = [sys.executable, __file__, case, "--chips", chip, "--dumps", dumps]
                worker = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
                if worker.returncode:
                    sys.exit(worker.stderr)


if __name__ == "__main__":
    main()
