"""Counts the TPU attention kernels, and jax's splash attention on the same shape, without a TPU.

Two counts: instruction bundles of the compiled kernels (each takes a cycle at least) times how often each part of the
program runs, and bytes between the chip's memory and fast memory. Neither is a time: waiting for memory and fetching
instructions is not in them.

    python scripts/count_attention.py                          # Scout, T 8192, four chips; about 6 minutes on two cores
    python scripts/count_attention.py --chips v6e --tokens 131072
    python scripts/count_attention.py --chips v6e --splash-blocks 512 1024 512
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from l4jax.topology import CHIPS, compile_ahead, one_chip
from pallas_kernels.attention import tiles
from pallas_kernels.attention.traffic import Call, backward_traffic, forward_traffic
from pallas_kernels.shapes import TEXT_SHAPES

SCOUT = TEXT_SHAPES["scout"]
DEVICE_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
COMPILED_TOKENS = 8192
"""The program of a kernel does not depend on the length; the counts of its parts are scaled to the length asked for."""


def compile_ours(chip: str) -> None:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import attention

    def gradients(q, k, v, d_out):
        out, backward = jax.vjp(lambda *qkv: attention(*qkv, implementation="pallas"), q, k, v)
        return out, backward(d_out)

    q, kv = (
        jax.ShapeDtypeStruct((1, COMPILED_TOKENS, heads, SCOUT.head_dim), jnp.bfloat16)
        for heads in (SCOUT.num_heads, SCOUT.num_kv_heads)
    )
    compile_ahead(gradients, one_chip(chip), q, kv, kv, q)


def compile_splash(chip: str, q_block: int, kv_block: int, kv_compute: int, fused: bool) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    separate = {} if fused else {"block_q_dq": q_block, "block_kv_dq": kv_block}
    sizes = splash.BlockSizes(
        block_q=q_block, block_kv=kv_block, block_kv_compute=kv_compute, block_q_dkv=q_block, block_kv_dkv=kv_block,
        block_kv_dkv_compute=kv_compute, use_fused_bwd_kernel=fused, **separate,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((COMPILED_TOKENS, COMPILED_TOKENS))] * SCOUT.num_heads)
    kernel = jax.vmap(splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes))

    def gradients(q, k, v, d_out):
        out, backward = jax.vjp(kernel, q, k, v)
        return out, backward(d_out)

    q, kv = (
        jax.ShapeDtypeStruct((1, heads, COMPILED_TOKENS, SCOUT.head_dim), jnp.bfloat16)
        for heads in (SCOUT.num_heads, SCOUT.num_kv_heads)
    )
    compile_ahead(gradients, one_chip(chip), q, kv, kv, q)


class Program(NamedTuple):
    """Bundles of a compiled kernel, cut where it branches.

    Attributes:
        before: of long stretches before the first tile of scores: they run when a block of rows starts.
        tiles: of the stretches that compute tiles: the first is the one without a mask.
        after: of long stretches after them: they store results.
        short: of all other stretches together, which run at every visit: moving blocks, deciding what is visible.
    """

    before: list[int]
    tiles: list[int]
    after: list[int]
    short: int


def count_bundles(chip: str, *program: Any) -> dict[str, Program]:
    """Returns the kernels of a program, by name.

    The compiler writes its listing when flags in the environment ask for it, hence a process of its own.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "--compile", json.dumps([chip, *program])]
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        kernels = {}
        for path in Path(directory).glob("*-final_bundles.txt"):
            name = re.search(r"(forward_kernel|backward_kernel|splash_mha_[a-z]+)\S*-\d+-final_bundles", path.name)
            if name:
                kernels[name[1]] = _read_listing(path)
        return kernels


def _read_listing(listing: Path) -> Program:
    (utilization,) = listing.parent.glob(f"{listing.name.split('-')[0]}-*final_hlo-static-per-bundle-utilization.txt")
    matrix_slots = [int(line.split()[0]) for line in utilization.read_text().splitlines()[4:] if line.strip()]
    cuts, length = [0], 0
    for line in listing.read_text().splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*: ", line)
        if bundle:
            cuts += [length] if bundle[1] else []
            length += 1
            cuts += [length] if "sbr.rel" in line else []
    program = Program([], [], [], 0)
    for start, stop in itertools.pairwise([*cuts, length]):
        if sum(matrix_slots[start:stop]) > 500:
            program.tiles.append(stop - start)
        elif stop - start >= 100:
            (program.after if program.tiles else program.before).append(stop - start)
        else:
            program = program._replace(short=program.short + stop - start)
    return program


def ours(chip: str, tokens: int, chunk_size: int | None) -> dict[str, tuple[int, int]]:
    """Returns (bundles, bytes) of the forward and the backward kernel."""
    kernels = count_bundles(chip, "ours")
    N, K, H = SCOUT.num_heads, SCOUT.num_kv_heads, SCOUT.head_dim
    call = Call(1, tokens, tokens, N, K, H, itemsize=2, chunk_size=chunk_size)
    sizes = tiles.forward_tiles(tokens, tokens, N, K, DEVICE_KINDS[chip])
    forward = forward_traffic(call, sizes)
    backward_sizes = tiles.backward_tiles(tokens, tokens, N, K, DEVICE_KINDS[chip])
    keys_per_pass = tiles.keys_per_pass(backward_sizes, H, DEVICE_KINDS[chip])
    backward = backward_traffic(call, backward_sizes, keys_per_pass)

    def total(program, traffic, sizes, stored_key_tiles):
        # A tile's stretch has all heads of a group; what is after the tiles runs per tile of queries, then of keys.
        per_row_tile = traffic.rows * sizes.q_block // sizes.q_tile
        return (
            traffic.visits * program.short
            + traffic.rows * sum(program.before)
            + K * (traffic.full_tiles * program.tiles[0] + traffic.partial_tiles * program.tiles[1])
            + per_row_tile * program.after[0]
            + stored_key_tiles * sum(program.after[1:])
        )

    stored_key_tiles = K * tokens // backward_sizes.kv_tile
    return {
        "forward": (
            total(kernels["forward_kernel"], forward, sizes, 0),
            forward.bytes_read + forward.bytes_written,
        ),
        "backward": (
            total(kernels["backward_kernel"], backward, backward_sizes, stored_key_tiles),
            backward.bytes_read + backward.bytes_written,
        ),
    }


def splash(chip: str, tokens: int, chunk_size: int | None, blocks: list[int]) -> dict[str, tuple[int, int]]:
    """Returns (bundles, bytes) of splash attention; its two backward kernels together, and its fused one."""
    q_block, kv_block, _ = blocks
    N, K, H = SCOUT.num_heads, SCOUT.num_kv_heads, SCOUT.head_dim
    chunk = chunk_size or tokens
    visits = N * sum(-(-(start % chunk + q_block) // kv_block) for start in range(0, tokens, q_block))
    rows, columns = N * tokens // q_block, N * tokens // kv_block
    # The grid is a rectangle as wide as the longest row; a step that computes nothing still runs the short stretches.
    steps = rows * chunk // kv_block
    separate, fused = (count_bundles(chip, "splash", *blocks, fused) for fused in (False, True))

    def total(program, rows):
        return steps * program.short + visits * program.tiles[0] + rows * (sum(program.before) + sum(program.after))

    queries = tokens * N * H * 2
    keys_read, queries_read = 2 * visits * kv_block * H * 2, 2 * visits * q_block * H * 2
    statistics = tokens * N * 128 * 4  # stored 128 times
    dkv_bytes = queries_read + (2 + 2) * tokens * K * H * 2
    return {
        "forward": (total(separate["splash_mha_fwd"], rows), 2 * queries + keys_read + statistics),
        "backward": (
            total(separate["splash_mha_dq"], rows) + total(separate["splash_mha_dkv"], columns),
            3 * queries + keys_read + dkv_bytes,
        ),
        # It writes a gradient of all queries for each block of keys, and adds them up afterwards.
        "backward, fused": (
            total(fused["splash_mha_dkv"], columns),
            dkv_bytes + 2 * (tokens // kv_block) * queries + queries,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(CHIPS), help="of v5e, v5p, v6e, tpu7x; with commas")
    parser.add_argument("--tokens", type=int, default=8192, help="length of one sequence, a multiple of 8192")
    parser.add_argument("--chunk-size", type=int, help="tokens per chunk, a multiple of 1024; without: full causal")
    parser.add_argument(
        "--splash-blocks", type=int, nargs=3, default=[1024, 1024, 512], help="queries, keys, keys computed at once"
    )
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        chip, program, *options = json.loads(arguments.compile)
        {"ours": compile_ours, "splash": compile_splash}[program](chip, *options)
        return
    chunk = arguments.chunk_size or arguments.tokens
    shape = f"T {arguments.tokens}, {'chunks of ' + str(chunk) if arguments.chunk_size else 'full causal'}"
    print(f"Scout ({SCOUT.num_heads} heads, {SCOUT.num_kv_heads} kv heads, width {SCOUT.head_dim}, bfloat16), {shape}")
    scores = SCOUT.num_heads * arguments.tokens * (chunk + 1) // 2
    print(f"{'chip':6} {'kernel':16} {'who':7} {'bundles':>14} {'per 1024 scores':>16} {'GB':>8}")
    for chip in arguments.chips.split(","):
        results = {
            "ours": ours(chip, arguments.tokens, arguments.chunk_size),
            "splash": splash(chip, arguments.tokens, arguments.chunk_size, arguments.splash_blocks),
        }
        for kernel in ("forward", "backward", "backward, fused"):
            for who, counts in results.items():
                if kernel in counts:
                    bundles, moved = counts[kernel]
                    per_score = bundles / scores * 1024
                    print(
                        f"{chip:6} {kernel:16} {who:7} {bundles:14,} {per_score:16.2f} {moved / 1e9:8.3f}", flush=True
                    )


if __name__ == "__main__":
    main()
