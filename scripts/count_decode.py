"""Counts what the TPU compiler makes of decode attention, beside jax's paged_attention on the same shape.

    python scripts/count_decode.py [--chips v5e v6e] [--cases ring full]

Compiled ahead of time, no TPU needed; nothing is timed. A block's bundles are the VLIW instructions of the loop body
that reads and computes one block; the sum over all blocks is the kernel's time if memory were free and nothing stalled.
The bytes are those of the DMAs that the kernel starts; the ideal is every used slot once. The two bounds in
microseconds take published bandwidths and clock rates: a comparison, not a time.
"""

import re
from pathlib import Path
from typing import NamedTuple

H = 128
BYTES_PER_US = {"v5e": 819e3, "v5p": 2765e3 / 2, "v6e": 1640e3, "tpu7x": 7380e3 / 2}
"""Memory bandwidth of one core."""
CYCLES_PER_US = {"v5e": 1500, "v5p": 1750, "v6e": 1750, "tpu7x": 2200}


class Case(NamedTuple):
    batch: int
    used: int
    slots: int
    num_queries: int = 1
    dtype: str = "bfloat16"
    page_size: int | None = None
    num_kv_heads: int = 8

    @property
    def num_heads(self) -> int:
        return 5 * self.num_kv_heads


CASES = {
    "4k": Case(64, 4096, 8192),
    "ring": Case(64, 8192, 8192),
    "1M": Case(1, 1 << 20, 1 << 20),
    "page64": Case(64, 8192, 8192, page_size=64),
    "page128": Case(64, 8192, 8192, page_size=128),
    "int8": Case(64, 8192, 8192, dtype="int8"),
    "drafts4": Case(64, 8192, 8192, num_queries=4),
    "drafts8": Case(64, 8192, 8192, num_queries=8),
    "one head": Case(64, 8192, 8192, num_kv_heads=1),
}


def loops(path: Path) -> list[tuple[int, int]]:
    """Returns (depth, bundles) of every loop of a bundle listing, inner loops included in the outer ones."""
    found, open_loops = [], []
    for line in path.read_text().splitlines():
        match = re.match(r"\s*0x[0-9a-f]+\s+(LB|\s\s)?\s*:\s*(>*)\s*\{", line)
        if match is None:
            continue
        depth = len(match[2])
        while open_loops and (open_loops[-1][0] > depth or (match[1] == "LB" and open_loops[-1][0] == depth)):
            found.append(tuple(open_loops.pop()))
        if match[1] == "LB":
            open_loops.append([depth, 0])
        for loop in open_loops:
            loop[1] += 1
    return found + [tuple(loop) for loop in open_loops]


def compile_ours(chip: str, case: Case):
    import jax
    import jax.numpy as jnp

    from l4jax.topology import compile_ahead, one_chip
    from pallas_kernels import decode_attention
    from pallas_kernels.quantized import QuantizedArray

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = (
        (case.batch, case.slots)
        if case.page_size is None
        else (case.batch * case.slots // case.page_size, case.page_size)
    )
    cache = array(*rows, case.num_kv_heads, H, dtype=jnp.dtype(case.dtype))
    if case.dtype == "int8":
        cache = QuantizedArray(cache, array(*rows, case.num_kv_heads, 1, dtype=jnp.float32))
    q = array(case.batch, case.num_queries, case.num_heads, H, dtype=jnp.bfloat16)
    table = None if case.page_size is None else array(case.batch, case.slots // case.page_size)

    def run(q, k, v, lengths, table):
        return decode_attention(q, k, v, lengths, page_table=table, implementation="pallas")

    return compile_ahead(run, one_chip(chip), q, cache, cache, array(case.batch), table)
