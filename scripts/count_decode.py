"""Counts what the TPU compiler makes of decode attention, beside jax's paged_attention on the same shape.

    python scripts/count_decode.py [--chips v5e v6e] [--cases ring int8]

Compiled ahead of time: nothing runs, nothing is timed, no TPU is needed (libtpu is). Bundles are the VLIW instructions
of the loop that reads and computes one block of slots, times the blocks of one core: a lower bound of the cycles that
computing takes. Bytes are those of the DMAs that the kernel starts; the ideal is every used slot once. Both become
microseconds by published bandwidths and inferred clocks: the larger one bounds the kernel, if the DMAs hide the rest.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

BYTES_PER_US = {"v5e": 819_000, "v5p": 2_765_000, "v6e": 1_640_000, "tpu7x": 3_690_000}
CYCLES_PER_US = {"v5e": 1500, "v5p": 1750, "v6e": 1750, "tpu7x": 2200}
NUM_CORES = {"v5p": 2}
"""A device of tpu7x is one of the two cores of its chip, with half of the bandwidth."""

NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 8, 40, 128
PEER_BLOCKS = (512, 2048)


class Case(NamedTuple):
    batch: int
    used: int
    slots: int
    num_queries: int = 1
    dtype: str = "bfloat16"
    page_size: int | None = None


CASES = {
    "4k": Case(64, 4096, 8192),
    "ring": Case(64, 8192, 8192),
    "1M": Case(1, 1 << 20, 1 << 20),
    "pages of 64": Case(64, 8192, 8192, page_size=64),
    "pages of 128": Case(64, 8192, 8192, page_size=128),
    "int8": Case(64, 8192, 8192, dtype="int8"),
    "4 drafts": Case(64, 8192, 8192, num_queries=4),
    "8 drafts": Case(64, 8192, 8192, num_queries=8),
}


def compile_ours(chip: str, case: Case) -> None:
    import jax
    import jax.numpy as jnp

    from l4jax.topology import compile_ahead, one_chip
    from pallas_kernels import QuantizedArray, decode_attention

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    page_size = case.page_size or case.slots
    rows = (case.batch * case.slots // page_size, page_size, NUM_KV_HEADS)
    cache = array(*rows, HEAD_DIM, dtype=case.dtype)
    if case.dtype == "int8":
        cache = QuantizedArray(cache, array(*rows, 1, dtype="float32"))
    q = array(case.batch, case.num_queries, NUM_HEADS, HEAD_DIM, dtype="bfloat16")
    table = array(case.batch, case.slots // page_size) if case.page_size else None

    def run(q, k, v, lengths, table):
        return decode_attention(q, k, v, lengths, page_table=table, implementation="pallas")

    compile_ahead(run, one_chip(chip), q, cache, cache, array(case.batch), table)


def compile_peer(chip: str, case: Case, block_slots: int) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    from l4jax.topology import compile_ahead, one_chip

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    page_size = case.page_size or 128
    pages_per_row = case.slots // page_size
    q = array(case.batch, NUM_HEADS, HEAD_DIM, dtype="bfloat16")
    pages = array(NUM_KV_HEADS, case.batch * pages_per_row, page_size, HEAD_DIM, dtype="bfloat16")

    def run(q, k, v, lengths, table):
        megacore = "kv_head" if chip in NUM_CORES else None
        return paged_attention(
            q, k, v, lengths, table, pages_per_compute_block=block_slots // page_size, megacore_mode=megacore
        )

    table = array(case.batch, pages_per_row)
    compile_ahead(run, one_chip(chip), q, pages, pages, array(case.batch), table)


def loops(listing: Path) -> list[tuple[int, int, list[int]]]:
    """Returns (first bundle, bundles, sizes of the regions that a branch may skip) of each loop."""
    starts, waiting, found, skipped = {}, [], [], []
    for line in listing.read_text().splitlines():
        match = re.match(r"\s*(?:0x)?([0-9a-f]+)\s+(LB|\w\w)?\s*:", line)
        if match is None:
            continue
        address = int(match[1], 16)
        if match[2] == "LB":
            starts.update((region, address) for region in re.findall(r"Start region (\d+)", line))
        for region in re.findall(r"[Ee](?:nd|mpty) region (\d+)", line):
            skipped += [(at, address - at) for at, target in waiting if target == region]
        for region in re.findall(r"target = \$region(\d+)", line):
            if region in starts:
                found.append((starts[region], address + 1 - starts[region]))
            else:
                waiting.append((address, region))
    return [
        (start, size, sorted((s for at, s in skipped if start <= at < start + size), reverse=True))
        for start, size in found
    ]


def dump_loops(kernel: str, *arguments) -> list[tuple[int, int, list[int]]]:
    """Compiles in a process of its own, for libtpu reads its flags once, and returns the loops of the kernel."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
        subprocess.run(
            [sys.executable, __file__, "--compile", *map(str, arguments)], env=environment, check=True,
            capture_output=True,
        )  # fmt: skip
        (listing,) = (p for p in Path(folder).glob(f"*-{kernel}*-final_bundles.txt") if "schedule" not in p.name)
        return loops(listing)


def count_ours(chip: str, name: str) -> tuple[str, int, int, int]:
    """Returns (block, bundles of one block, blocks of one core, bytes read)."""
    import jax.numpy as jnp
    import numpy as np

    from l4jax.topology import one_chip
    from pallas_kernels.decode_attention.tiles import bytes_read, choose_tiles

    case, dtype = CASES[name], jnp.dtype(CASES[name].dtype)
    table = np.zeros((case.batch, case.slots // case.page_size)) if case.page_size else None
    shape = (case.batch, case.page_size or case.slots, NUM_KV_HEADS, HEAD_DIM)
    tiles = choose_tiles(one_chip(chip).devices.flat[0].device_kind, shape, dtype, table)
    found = sorted(dump_loops("decode_attention", "ours", chip, name), key=lambda loop: loop[1])
    start, bundles, skipped = found[-2 if case.batch > 1 else -1]  # around it is the loop over the grid
    if dtype != jnp.int8:
        bundles -= skipped[0]  # clears the end of the last block
    if case.page_size:  # the loop that starts the DMAs of a block's pages
        inner = max(size for at, size, _ in found if start < at < start + bundles + skipped[0])
        bundles += inner * (tiles.block_slots // case.page_size - 1)
    blocks = case.batch * -(-case.used // tiles.block_slots) // tiles.num_splits
    read = bytes_read([case.used] * case.batch, tiles, NUM_KV_HEADS, HEAD_DIM, dtype, case.page_size)
    return f"{tiles.block_slots}", bundles, blocks, read


def count_peer(chip: str, name: str, block_slots: int) -> tuple[str, int, int, int]:
    case = CASES[name]
    found = sorted(dump_loops("paged_attention", "peer", chip, name, block_slots), key=lambda loop: loop[1])
    _, bundles, skipped = found[-2]
    bundles -= skipped[2] if len(skipped) > 2 else 0  # starts the very first block; the larger ones run in each step
    blocks = case.batch * NUM_KV_HEADS * -(-case.used // block_slots)
    read = blocks * block_slots * HEAD_DIM * 2 * 2
    return f"{block_slots} x 1 head", bundles, blocks // NUM_CORES.get(chip, 1), read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=list(BYTES_PER_US), choices=list(BYTES_PER_US))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        which, chip, name, *block = arguments.compile
        if which == "ours":
            compile_ours(chip, CASES[name])
        else:
            compile_peer(chip, CASES[name], int(block[0]))
        return
    print("chip   case          kernel           block  bundles  per slot   compute us    bytes/ideal   memory us")
    for chip in arguments.chips:
        for name in arguments.cases:
            case = CASES[name]
            per_head = 2 * (HEAD_DIM * (1 if case.dtype == "int8" else 2) + (4 if case.dtype == "int8" else 0))
            ideal = case.batch * case.used * NUM_KV_HEADS * per_head
            rows = [("ours", count_ours(chip, name))]
            if case.dtype == "bfloat16" and case.num_queries == 1:
                rows += [("paged_attention", count_peer(chip, name, block)) for block in PEER_BLOCKS]
            for kernel, (block, bundles, blocks, read) in rows:
                per_slot = bundles * blocks * NUM_CORES.get(chip, 1) / (case.batch * case.used)
                compute_us, memory_us = bundles * blocks / CYCLES_PER_US[chip], read / BYTES_PER_US[chip]
                print(
                    f"{chip:6} {name:13} {kernel:15} {block:>13} {bundles:7} {per_slot:8.2f} {compute_us:12.0f} "
                    f"{read / ideal:13.3f} {memory_us:12.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
