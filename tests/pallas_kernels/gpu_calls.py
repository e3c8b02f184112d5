"""Calls of the GPU kernels at the shapes of Scout and Maverick, and what each kernel of a call has to do.

Tests lower them, `scripts/check_gpu_compile.py` compiles them. Works are counted from tile sizes, for the GPU that is
the target.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedArray, attention, decode_attention, grouped_matmul, grouped_swiglu
from pallas_kernels.attention.blocks import (
    every_pair,
    key_ranges,
    make_labels,
    may_see,
    pad_labels,
    query_ranges,
)
from pallas_kernels.attention.tiles import gpu_tiles
from pallas_kernels.decode_attention.tiles import choose_gpu_tiles
from pallas_kernels.grouped_matmul import gpu as grouped
from pallas_kernels.grouped_matmul import tiles as grouped_tiles
from pallas_kernels.grouped_matmul.gradients import Stack
from pallas_kernels.shapes import TEXT_SHAPES, VISION_SHAPES

scout, vision = TEXT_SHAPES["scout"], VISION_SHAPES["llama4-vision"]
N, K, H = scout.num_heads, scout.num_kv_heads, scout.head_dim
WIDE, TALL = (scout.hidden_size, scout.intermediate_size), (scout.intermediate_size, scout.hidden_size)


class Work(NamedTuple):
    """What a kernel does, beside the least that would do.

    Attributes:
        kernel: its name.
        flops: of the products, tiles that are partly empty included.
        least_flops: of what the result needs.
        loads: bytes that all programs read and write; what several of them read comes from the L2 cache.
        least_bytes: everything that is needed, once.
    """

    kernel: str
    flops: float
    least_flops: float
    loads: float
    least_bytes: float


class Call(NamedTuple):
    function: Callable
    arguments: tuple
    works: Callable[[], list[Work]]


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def gradients(function, argnums, *arguments, cotangents):
    """Returns a call of the gradients of a function to some of its arguments."""

    def run(arguments, cotangents):
        def of(*chosen):
            given = list(arguments)
            for index, value in zip(argnums, chosen, strict=True):
                given[index] = value
            return function(*given)

        return jax.vjp(of, *(arguments[index] for index in argnums))[1](cotangents)

    return run, (arguments, cotangents)


# --- Routed experts ---------------------------------------------------------------------------------------------------


def grouped_call(
    op, num_rows, num_experts, held, matrix, dtype=None, group_size=None, gradient=False, rows="bfloat16", layers=None
):
    """Returns a call with random groups.

    Args:
        held: how many of the experts have their matrices here.
        matrix: its shape.
        dtype: of quantised weights.
        group_size: numbers along the matrix that share a scale; None means all.
        layers: how many have their weights in one stack; None means no stack.
    """
    (depth, width), num_weights = matrix, 2 if op is grouped_swiglu else 1
    leading = (held,) if layers is None else (layers, held)
    weights = array(*leading, depth, width, dtype=dtype or rows)
    if dtype is not None:
        weights = QuantizedArray(weights, array(*leading, depth // (group_size or depth), width, dtype="float32"))
    x, sizes, number = array(num_rows, depth, dtype=rows), array(num_experts, dtype="int32"), array(dtype="int32")
    weights, offset, layer = [weights] * num_weights, None if held == num_experts else number, layers and number

    def function(x, weights, sizes, offset, layer):
        return op(x, *weights, sizes, offset, layer, implementation="pallas")

    def works():
        groups = np.random.default_rng(0).multinomial(num_rows, [1 / num_experts] * num_experts)[:held]
        d_out = [array(num_rows, width, dtype=rows)] * num_weights
        results = 2 * num_weights - 1 if gradient else 1
        forward = rows_work([x], weights, groups, num_experts, False, results)
        backward = rows_work(d_out, weights, groups, num_experts, True, 1)
        outer = [outer_work(x, d_out[0], groups)] * (num_weights if dtype is None else 0)
        if not gradient:
            return [forward]
        return [*([forward] if op is grouped_swiglu else []), backward, *outer]

    if not gradient:
        return Call(function, (x, weights, sizes, offset, layer), works)
    argnums = (0, 1) if dtype is None else (0,)
    cotangents = array(num_rows, width, dtype=rows)
    return Call(*gradients(function, argnums, x, weights, sizes, offset, layer, cotangents=cotangents), works)


def rows_work(rows, weights, groups, num_experts, transposed, num_results):
    weights = [jax.eval_shape(lambda w: Stack.of(w, None).weights_mDF, weight) for weight in weights]
    if transposed or sum(groups) > grouped_tiles.GPU_FEW_ROWS * num_experts:  # XLA makes quantised ones wide first
        weights = [array(*weight.shape, dtype=rows[0].dtype) for weight in weights]
    t = grouped.row_tiles_for(rows, weights, num_experts, transposed)
    depth, width = weights[0].shape[-2:][::-1] if transposed else weights[0].shape[-2:]
    num_blocks, num_rows = sum(-(-groups // t.rows)), sum(groups)
    itemsize, weight_bytes = rows[0].dtype.itemsize, grouped_tiles.bits(weights[0].dtype) / 8
    flops = 2 * len(weights) * depth * width
    read_rows, stored = len(rows) * depth * itemsize, num_results * width * itemsize
    read_weights = len(weights) * depth * width * weight_bytes
    column_tiles = -(-width // t.cols)
    return Work(
        "grouped_rows_times_weights",
        flops * num_blocks * t.rows,
        flops * num_rows,
        num_rows * (column_tiles * read_rows + stored) + num_blocks * read_weights,
        num_rows * (read_rows + stored) + np.count_nonzero(groups) * read_weights,
    )


def outer_work(x, d_out, groups):
    t = grouped_tiles.gpu_outer_tiles(x.dtype.itemsize)
    depth, width, num_rows = x.shape[1], d_out.shape[1], sum(groups)
    flops, stored = 2 * depth * width, len(groups) * depth * width
    reads = num_rows * (-(-width // t.cols) * depth + -(-depth // t.depth) * width)
    return Work(
        "grouped_outer_products",
        flops * sum(-(-groups // t.rows)) * t.rows,
        flops * num_rows,
        (reads + stored) * x.dtype.itemsize,
        (num_rows * (depth + width) + stored) * x.dtype.itemsize,
    )


# --- Attention --------------------------------------------------------------------------------------------------------


def attention_call(
    shape, causal=True, chunk_size=None, first_query=0, num_segments=None, gradient=False, dtype="bfloat16"
):
    """Returns a call with shape (B, T, S, N, K, H).

    Args:
        first_query: position of the first query; the keys' begin at 0.
        num_segments: documents of equal length in a row; None means one.
    """
    B, T, S, N, K, H = shape
    q, kv = array(B, T, N, H, dtype=dtype), array(B, S, K, H, dtype=dtype)
    ids = [None, None] if num_segments is None else [array(B, T, dtype="int32"), array(B, S, dtype="int32")]

    def function(q, k, v, q_ids, kv_ids):
        positions = jnp.broadcast_to(first_query + jnp.arange(T, dtype=jnp.int32), (B, T)) if first_query else None
        return attention(
            q, k, v, causal, chunk_size, positions, None, q_ids, kv_ids, return_lse=True, implementation="pallas"
        )

    def works():
        given = np.arange(first_query, first_query + T)[None], np.arange(S)[None]
        if num_segments is None:
            segments = None, None
        else:
            segments = tuple(1 + np.arange(length)[None] * num_segments // length for length in (T, S))
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # counted here, not on the target
            labels = make_labels((1, T, S), *given, *segments, causal, chunk_size)
        labels = [type(x)(*(None if y is None else np.asarray(y) for y in x)) for x in labels]
        seen = count_visible(*labels)
        kernels = gpu_tiles(q.dtype.itemsize)

        def work(name, tiles, num_products, num_query_arrays, num_key_arrays, by_keys=False):
            queries, keys = (pad_labels(x, size) for x, size in zip(labels, tiles[:2], strict=True))
            pairs = every_pair(query_ranges(queries, tiles.q_block), key_ranges(keys, tiles.kv_block))
            num_tiles, flops = B * N * int(may_see(*pairs).sum()), 2 * H * num_products
            row_bytes = H * q.dtype.itemsize
            query_bytes, key_bytes = num_query_arrays * B * T * N * row_bytes, num_key_arrays * B * S * K * row_bytes
            # Two arrays of the other side pass by, a block for each tile.
            stays, passing = (key_bytes, tiles.q_block) if by_keys else (query_bytes, tiles.kv_block)
            return Work(
                name,
                flops * num_tiles * tiles.q_block * tiles.kv_block,
                flops * B * N * seen,
                stays + 2 * num_tiles * passing * row_bytes,
                query_bytes + key_bytes,
            )

        forward = work("attention_forward", kernels.forward, 2, 2, 2)
        if not gradient:
            return [forward]
        return [
            forward,
            work("attention_query_gradients", kernels.query_gradients, 3, 3, 2),
            work("attention_key_gradients", kernels.key_gradients, 4, 2, 4, by_keys=True),
        ]

    if not gradient:
        return Call(function, (q, kv, kv, *ids), works)
    cotangents = q, array(B, T, N, dtype="float32")
    return Call(*gradients(function, (0, 1, 2), q, kv, kv, *ids, cotangents=cotangents), works)


def count_visible(queries, keys):
    """Returns how many pairs there are, where positions and segments of the keys ascend."""
    (position,), (low,), (high,) = keys.position, queries.low, queries.high
    first, end = np.searchsorted(position, low), np.searchsorted(position, high, "right")
    if keys.segment is not None:
        (segments,), (segment,) = keys.segment, queries.segment
        first = np.maximum(first, np.searchsorted(segments, segment))
        end = np.minimum(end, np.searchsorted(segments, segment, "right"))
    return int(np.maximum(end - first, 0).sum())


def decode_call(
    B,
    S,
    used,
    page_size=None,
    chunk_size=None,
    num_queries=1,
    num_kv_heads=K,
    int8=False,
    offset=False,
    dtype="bfloat16",
):
    """Returns a call in which every sequence uses so many of its S slots."""
    rows = (B, S) if page_size is None else (B * S // page_size, page_size)
    cache = array(*rows, num_kv_heads, H, dtype="int8" if int8 else dtype)
    if int8:
        cache = QuantizedArray(cache, array(*rows, num_kv_heads, 1, dtype="float32"))
    q = array(B, num_queries, N // K * num_kv_heads, H, dtype=dtype)
    table = None if page_size is None else array(B, S // page_size, dtype="int32")
    kv_offset = array(dtype="int32") if offset else None

    def function(q, k, v, lengths, table, kv_offset):
        return decode_attention(
            q, k, v, lengths, chunk_size, table, kv_offset, return_lse=True, implementation="pallas"
        )

    def works():
        num_rows = num_queries * N // K
        t = choose_gpu_tiles(B * num_kv_heads, S, num_rows, page_size, q.dtype.itemsize)
        slots = -(-used // t.block_slots) * t.block_slots
        flops = 4 * B * num_kv_heads * H
        slot_bytes = 2 * B * num_kv_heads * (H + 4 if int8 else H * q.dtype.itemsize)
        q_bytes = q.size * q.dtype.itemsize
        parts = t.num_splits * q.size * (4 if t.num_splits > 1 else q.dtype.itemsize)
        return [
            Work(
                "decode_attention",
                flops * t.rows * slots,
                flops * num_rows * used,
                slot_bytes * used + t.num_splits * q_bytes + parts,
                slot_bytes * used + 2 * q_bytes,
            )
        ]

    return Call(function, (q, cache, cache, array(B, dtype="int32"), table, kv_offset), works)


GRADIENT = {"gradient": True}
INT4 = {"dtype": "int4", "group_size": 128}
FLOAT32 = "float32"

CALLS = {
    "Scout prefill, gate and up": lambda: grouped_call(grouped_swiglu, 8192, 16, 16, WIDE),
    "Scout prefill, down": lambda: grouped_call(grouped_matmul, 8192, 16, 16, TALL),
    "Scout training, gate and up": lambda: grouped_call(grouped_swiglu, 16384, 16, 16, WIDE, **GRADIENT),
    "Scout training, down": lambda: grouped_call(grouped_matmul, 16384, 16, 16, TALL, **GRADIENT),
    "Scout training, 4 of 16 experts": lambda: grouped_call(grouped_swiglu, 16384, 16, 4, WIDE, **GRADIENT),
    "Scout decode, gate and up": lambda: grouped_call(grouped_swiglu, 64, 16, 16, WIDE),
    "Scout decode, down": lambda: grouped_call(grouped_matmul, 64, 16, 16, TALL),
    "Scout decode, one row, gate and up": lambda: grouped_call(grouped_swiglu, 1, 16, 16, WIDE),
    "Scout decode, one row, down": lambda: grouped_call(grouped_matmul, 1, 16, 16, TALL),
    "Scout decode in int8": lambda: grouped_call(grouped_swiglu, 64, 16, 16, WIDE, "int8"),
    "Scout decode in fp8": lambda: grouped_call(grouped_matmul, 64, 16, 16, TALL, "float8_e4m3fn"),
    "Scout decode in int4": lambda: grouped_call(grouped_swiglu, 64, 16, 16, WIDE, **INT4),
    "Scout decode in int4, down": lambda: grouped_call(grouped_matmul, 64, 16, 16, TALL, **INT4),
    "Scout decode in int8, one row": lambda: grouped_call(grouped_matmul, 1, 16, 16, TALL, "int8"),
    "Scout decode in int4, one row": lambda: grouped_call(grouped_swiglu, 1, 16, 16, WIDE, **INT4),
    "Scout decode, 16 layers in a stack": lambda: grouped_call(grouped_swiglu, 64, 16, 16, WIDE, layers=16),
    "Scout decode in int4, 12 layers in a stack": lambda: grouped_call(
        grouped_swiglu, 64, 16, 16, WIDE, **INT4, layers=12
    ),
    "Scout prefill in int8": lambda: grouped_call(grouped_swiglu, 8192, 16, 16, WIDE, "int8"),
    "Scout prefill in int8 by groups": lambda: grouped_call(grouped_matmul, 8192, 16, 16, TALL, "int8", 128),
    "Scout prefill in int4": lambda: grouped_call(grouped_swiglu, 8192, 16, 16, WIDE, **INT4),
    "Scout prefill in fp8": lambda: grouped_call(grouped_matmul, 8192, 16, 16, TALL, "float8_e4m3fn"),
    "Scout rows' gradient in int4": lambda: grouped_call(grouped_swiglu, 8192, 16, 16, WIDE, **INT4, **GRADIENT),
    "Scout rows' gradient in int8": lambda: grouped_call(grouped_matmul, 512, 16, 16, TALL, "int8", **GRADIENT),
    "ragged columns in fp8": lambda: grouped_call(grouped_matmul, 70, 4, 4, (256, 160), "float8_e4m3fn"),
    "ragged columns in int4": lambda: grouped_call(grouped_swiglu, 70, 4, 4, (256, 164), "int4"),
    "Maverick prefill, gate and up": lambda: grouped_call(grouped_swiglu, 8192, 128, 128, WIDE),
    "Maverick prefill, down": lambda: grouped_call(grouped_matmul, 8192, 128, 128, TALL),
    "Maverick training, 16 of 128 experts": lambda: grouped_call(grouped_swiglu, 16384, 128, 16, WIDE, **GRADIENT),
    "Maverick decode": lambda: grouped_call(grouped_swiglu, 256, 128, 128, WIDE),
    "Maverick decode, one row": lambda: grouped_call(grouped_matmul, 1, 128, 128, TALL),
    "Maverick decode in int8": lambda: grouped_call(grouped_swiglu, 256, 128, 128, WIDE, "int8"),
    "Maverick decode in int4, 64 experts": lambda: grouped_call(grouped_matmul, 64, 128, 64, TALL, **INT4),
    "float32 experts": lambda: grouped_call(grouped_swiglu, 1024, 16, 16, WIDE, rows=FLOAT32, **GRADIENT),
    "chunked layer": lambda: attention_call((1, 8192, 8192, N, K, H), chunk_size=scout.chunk_size),
    "chunked layer, training": lambda: attention_call((1, 16384, 16384, N, K, H), chunk_size=8192, **GRADIENT),
    "full layer, training": lambda: attention_call((1, 16384, 16384, N, K, H), **GRADIENT),
    "packed documents, training": lambda: attention_call((2, 8192, 8192, N, K, H), num_segments=3, **GRADIENT),
    "against a cache": lambda: attention_call((1, 2048, 131_072, N, K, H), first_query=100_000),
    "one of eight devices": lambda: attention_call((1, 8192, 8192, N // K, 1, H), **GRADIENT),
    "heads of 64": lambda: attention_call((1, 8192, 8192, 8, 2, 64), chunk_size=512, **GRADIENT),
    "pictures": lambda: attention_call((16, *[vision[0]] * 2, *[vision[1]] * 2, vision[2]), False, **GRADIENT),
    "float32 attention": lambda: attention_call((1, 2048, 2048, N, K, H), dtype=FLOAT32, **GRADIENT),
    "decode, ring": lambda: decode_call(64, 8192, 8192, chunk_size=8192),
    "decode, full cache": lambda: decode_call(8, 131_072, 100_000),
    "decode, one sequence": lambda: decode_call(1, 8192, 4000),
    "decode, a million tokens": lambda: decode_call(1, 1 << 20, 1 << 20),
    "decode, a shard of the cache, one kv head": lambda: decode_call(1, 1 << 20, 1 << 20, num_kv_heads=1, offset=True),
    "decode, pages": lambda: decode_call(64, 8192, 8192, page_size=128, chunk_size=8192),
    "decode, pages of 16, four drafts": lambda: decode_call(8, 131_072, 100_000, page_size=16, num_queries=4),
    "decode, eight drafts": lambda: decode_call(8, 8192, 8192, num_queries=8),
    "decode, int8": lambda: decode_call(64, 8192, 8192, int8=True),
    "decode, int8 pages, four drafts": lambda: decode_call(8, 131_072, 100_000, 128, int8=True, num_queries=4),
    "decode, float32": lambda: decode_call(8, 8192, 8192, dtype=FLOAT32),
    "decode, float32 and int8": lambda: decode_call(8, 8192, 8192, int8=True, dtype=FLOAT32),
}
