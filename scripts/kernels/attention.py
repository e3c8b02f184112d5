"""Attention of Scout's shape, forward and gradients: ours, jax's splash attention and tokamax's descendant of it.

Two cores are taken to share heads, or the sequences of a batch: splash's gradients share nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.cases import NUM_CORES, Case, Count, Program, array, device_kind
from kernels.dumps import Kernel
from pallas_kernels.attention import attention, attention_gradients, tiles
from pallas_kernels.attention.traffic import Call, Traffic, backward_traffic, forward_traffic
from pallas_kernels.shapes import TEXT_SHAPES

SCOUT = TEXT_SHAPES["scout"]
N, K, H = SCOUT.num_heads, SCOUT.num_kv_heads, SCOUT.head_dim
COMPILED_TOKENS = 8192
"""The program of a kernel does not depend on the length; the counts of its parts are scaled to the length of a case."""
Q_BLOCK, KV_BLOCK, KV_COMPUTE = 1024, 1024, 512
"""Of splash: queries, keys, keys computed at once. Of the usual choices the one with the fewest bundles."""

q, kv, lse = (
    array(1, COMPILED_TOKENS, N, H),
    array(1, COMPILED_TOKENS, K, H),
    array(1, COMPILED_TOKENS, N, dtype=jnp.float32),
)
head_major = array(1, N, COMPILED_TOKENS, H), array(1, K, COMPILED_TOKENS, H)


class Shape(NamedTuple):
    """One sequence; `chunk` tokens per chunk, all of them without chunks."""

    tokens: int
    chunk: int

    @property
    def scores(self) -> int:
        """Visible pairs of a query and a key, over all heads."""
        return N * self.tokens * (self.chunk + 1) // 2

    @property
    def q_bytes(self) -> int:
        return self.tokens * N * H * 2

    @property
    def kv_bytes(self) -> int:
        return self.tokens * K * H * 2

    @property
    def lse_bytes(self) -> int:
        return self.tokens * N * 4

    def forward(self, bundles: float, bytes_moved: int, scores: int) -> Count:
        ideal = 2 * self.q_bytes + 2 * self.kv_bytes + self.lse_bytes
        return Count(int(bundles), bytes_moved, ideal, 4 * H * scores, 4 * H * self.scores)

    def backward(self, bundles: float, bytes_moved: int, scores: int, products: int = 5) -> Count:
        ideal = 3 * self.q_bytes + 4 * self.kv_bytes + 2 * self.lse_bytes
        return Count(int(bundles), bytes_moved, ideal, 2 * products * H * scores, 10 * H * self.scores)


class Parts(NamedTuple):
    """Bundles of a kernel's stretches, by what they do.

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


def parts(kernel: Kernel) -> Parts:
    found = Parts([], [], [], 0)
    for stretch in kernel.stretches():
        if kernel.products(stretch) > 500:
            found.tiles.append(len(stretch))
        elif len(stretch) >= 100:
            (found.after if found.tiles else found.before).append(len(stretch))
        else:
            found = found._replace(short=found.short + len(stretch))
    return found


def _ours_bundles(kernel: Kernel, traffic: Traffic, sizes: tiles.Tiles, stored_key_tiles: int) -> int:
    """A tile's stretch has all heads of a group; what is after the tiles runs per tile of queries, then of keys."""
    part = parts(kernel)
    return (
        traffic.visits * part.short
        + traffic.rows * sum(part.before)
        + K * (traffic.full_tiles * part.tiles[0] + traffic.partial_tiles * part.tiles[1])
        + traffic.rows * sizes.q_block // sizes.q_tile * part.after[0]
        + stored_key_tiles * sum(part.after[1:])
    )


def _computed(traffic: Traffic, sizes: tiles.Tiles) -> int:
    return N * (traffic.full_tiles + traffic.partial_tiles) * sizes.q_tile * sizes.kv_tile


def _call(shape: Shape) -> Call:
    chunk_size = None if shape.chunk == shape.tokens else shape.chunk
    return Call(1, shape.tokens, shape.tokens, N, K, H, itemsize=2, chunk_size=chunk_size)


def ours(shape: Shape) -> Callable[[str], Program]:
    def make(chip: str) -> Program:
        sizes = tiles.forward_tiles(shape.tokens, shape.tokens, N, K, device_kind(chip))
        traffic = forward_traffic(_call(shape), sizes)

        def count(kernel: Kernel) -> Count:
            bundles = _ours_bundles(kernel, traffic, sizes, 0) / NUM_CORES[chip]
            return shape.forward(bundles, traffic.bytes_read + traffic.bytes_written, _computed(traffic, sizes))

        return Program(_with_pallas(attention), [q, kv, kv], ("forward_kernel",), count)

    return make


def ours_backward(shape: Shape) -> Callable[[str], Program]:
    def make(chip: str) -> Program:
        sizes = tiles.backward_tiles(shape.tokens, shape.tokens, N, K, device_kind(chip))
        traffic = backward_traffic(_call(shape), sizes, tiles.keys_per_pass(sizes, H, device_kind(chip)))

        def count(kernel: Kernel) -> Count:
            stored = K * shape.tokens // sizes.kv_tile
            bundles = _ours_bundles(kernel, traffic, sizes, stored) / NUM_CORES[chip]
            return shape.backward(bundles, traffic.bytes_read + traffic.bytes_written, _computed(traffic, sizes))

        arguments = [q, kv, kv, q, lse, q, lse]
        return Program(_with_pallas(attention_gradients), arguments, ("backward_kernel",), count)

    return make


def _with_pallas(function: Callable) -> Callable:
    return lambda *arguments: function(*arguments, implementation="pallas")


def _visits(shape: Shape) -> int:
    """Returns how many blocks of scores splash computes, over all heads."""
    starts = range(0, shape.tokens, Q_BLOCK)
    return N * sum(-(-(start % shape.chunk + Q_BLOCK) // KV_BLOCK) for start in starts)


def _splash_bundles(kernel: Kernel, steps: int, visits: int, rows: int) -> int:
    """A stretch computes a block; of two the second has the mask, which one block of each row (or column) needs."""
    part = parts(kernel)
    blocks = (visits - rows) * part.tiles[0] + rows * part.tiles[-1]
    return steps * part.short + blocks + rows * (sum(part.before) + sum(part.after))


def _splash(fused: bool) -> Callable:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    separate = {} if fused else {"block_q_dq": Q_BLOCK, "block_kv_dq": KV_BLOCK}
    sizes = splash.BlockSizes(
        block_q=Q_BLOCK, block_kv=KV_BLOCK, block_kv_compute=KV_COMPUTE, block_q_dkv=Q_BLOCK, block_kv_dkv=KV_BLOCK,
        block_kv_dkv_compute=KV_COMPUTE, use_fused_bwd_kernel=fused, **separate,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((COMPILED_TOKENS, COMPILED_TOKENS))] * N)
    return jax.vmap(splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes))


def _rectangle(shape: Shape) -> int:
    """Returns the steps of splash's grid, as wide as its longest row; an idle step runs the short stretches."""
    return N * (shape.tokens // Q_BLOCK) * (shape.chunk // KV_BLOCK)


def splash(shape: Shape) -> Callable[[str], Program]:
    def make(chip: str) -> Program:
        visits = _visits(shape)

        def count(kernel: Kernel) -> Count:
            bundles = _splash_bundles(kernel, _rectangle(shape), visits, N * shape.tokens // Q_BLOCK)
            bytes_moved = 2 * shape.q_bytes + 2 * visits * KV_BLOCK * H * 2
            return shape.forward(bundles / NUM_CORES[chip], bytes_moved, visits * Q_BLOCK * KV_BLOCK)

        queries, keys = head_major
        return Program(_splash(fused=False), [queries, keys, keys], ("splash_mha_fwd",), count)

    return make


def splash_backward(shape: Shape, fused: bool) -> Callable[[str], Program]:
    """Its two kernels, or the fused one, which writes a gradient of all queries for each block of keys, and adds."""

    def make(chip: str) -> Program:
        visits, rows, columns = _visits(shape), N * shape.tokens // Q_BLOCK, N * shape.tokens // KV_BLOCK

        def gradients(q, k, v, d_out):
            out, backward = jax.vjp(_splash(fused), q, k, v)
            return out, backward(d_out)

        def count(dkv: Kernel, *dq: Kernel) -> Count:
            bundles = _splash_bundles(dkv, _rectangle(shape), visits, columns)
            bytes_moved = 2 * visits * Q_BLOCK * H * 2 + 4 * shape.kv_bytes
            if fused:
                bytes_moved += (2 * (shape.tokens // KV_BLOCK) + 1) * shape.q_bytes
            else:
                bundles += _splash_bundles(*dq, _rectangle(shape), visits, rows)
                bytes_moved += 3 * shape.q_bytes + 2 * visits * KV_BLOCK * H * 2
            scores = visits * Q_BLOCK * KV_BLOCK
            return shape.backward(bundles / NUM_CORES[chip], bytes_moved, scores, products=5 if fused else 7)

        queries, keys = head_major
        kernels = ("splash_mha_dkv",) if fused else ("splash_mha_dkv", "splash_mha_dq")
        return Program(gradients, [queries, keys, keys, queries], kernels, count)

    return make


def tokamax(shape: Shape) -> Callable[[str], Program]:
    """Its forward kernel, whose grid has the visible blocks only."""

    def make(chip: str) -> Program:
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        config = splash_attention_kernel.SplashConfig(
            block_q=Q_BLOCK, block_kv=KV_BLOCK, block_kv_compute=KV_COMPUTE, use_experimental_scheduler=True
        )
        mask = splash_attention_mask.CausalMask((COMPILED_TOKENS, COMPILED_TOKENS))
        function: Any = splash_attention_kernel.make_splash_mha(mask, config=config, q_seq_shards=1)
        visits = _visits(shape)

        def count(kernel: Kernel) -> Count:
            bundles = _splash_bundles(kernel, visits, visits, N * shape.tokens // Q_BLOCK)
            bytes_moved = 2 * shape.q_bytes + 2 * visits * KV_BLOCK * H * 2
            return shape.forward(bundles / NUM_CORES[chip], bytes_moved, visits * Q_BLOCK * KV_BLOCK)

        queries, keys = head_major
        return Program(jax.vmap(function), [queries, keys, keys], ("splash_mha_fwd",), count)

    return make


def _forward_case(tokens: int, chunk: int) -> Case:
    shape = Shape(tokens, chunk)
    words = f"T {tokens}" + (f", chunks of {chunk}" if chunk < tokens else ", causal")
    programs = {"ours": ours(shape), "splash": splash(shape), "tokamax": tokamax(shape)}
    return Case("attention", f"{words}, {N} / {K} heads of {H}", programs)


_8K = Shape(8192, 8192)
CASES = {
    "attention-8k": _forward_case(8192, 8192),
    "attention-128k": _forward_case(131072, 131072),
    "attention-128k-chunked": _forward_case(131072, SCOUT.chunk_size),
    "attention-gradient-8k": Case(
        "attention, gradients",
        f"T 8192, causal, {N} / {K} heads of {H}",
        {
            "ours": ours_backward(_8K),
            "splash": splash_backward(_8K, fused=False),
            "splash fused": splash_backward(_8K, fused=True),
        },
    ),
}
