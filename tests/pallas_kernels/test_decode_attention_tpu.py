"""The Mosaic kernel of decode attention: compiled for real TPUs, and the bytes that it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.topology import CHIPS, compile_ahead, one_chip
from pallas_kernels import QuantizedArray, decode_attention
from pallas_kernels.decode_attention import tpu
from pallas_kernels.decode_attention.tiles import Tiles, bytes_read, choose_tiles
from pallas_kernels.shapes import TEXT_SHAPES
from pallas_kernels.tpu import INTERPRET
from tests.pallas_kernels.test_decode_attention import Case, H, inputs

scout = TEXT_SHAPES["scout"]  # Maverick's attention is the same

# (sequences, slots), and what is special.
COMPILED = {
    "ring": (64, scout.chunk_size, {"chunk_size": scout.chunk_size}),
    "full cache": (8, 131_072, {}),
    "a million tokens": (1, 1 << 20, {}),
    "a million tokens on one of several chips": (1, 1 << 20, {"kv_offset": True, "num_kv_heads": 1}),
    "ring of pages": (64, scout.chunk_size, {"page_size": 64, "chunk_size": scout.chunk_size}),
    "pages, four drafts": (8, 131_072, {"page_size": 128, "num_queries": 4}),
    "eight drafts": (8, 8192, {"num_queries": 8}),
    "int8": (64, 8192, {"cache_dtype": "int8"}),
    "int8 pages, four drafts": (8, 131_072, {"cache_dtype": "int8", "page_size": 128, "num_queries": 4}),
    "int8, one kv head": (8, 8192, {"cache_dtype": "int8", "num_kv_heads": 1}),
    "float32": (8, 8192, {"dtype": "float32"}),
    "float32 and int8, four kv heads": (8, 8192, {"dtype": "float32", "cache_dtype": "int8", "num_kv_heads": 4}),
    "two kv heads": (8, 8192, {"num_kv_heads": 2}),
}


def abstract_arguments(B, S, page_size=None, num_queries=1, dtype="bfloat16", cache_dtype=None, num_kv_heads=8):
    """Returns (q, k_cache, v_cache, lengths, page_table) of Scout, or of its part on a chip with fewer kv heads."""
    group = scout.num_heads // scout.num_kv_heads

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    rows = (B, S) if page_size is None else (B * S // page_size, page_size)
    cache = array(*rows, num_kv_heads, scout.head_dim, dtype=cache_dtype or dtype)
    if cache_dtype == "int8":
        cache = QuantizedArray(cache, array(*rows, num_kv_heads, 1, dtype="float32"))
    q = array(B, num_queries, num_kv_heads * group, scout.head_dim, dtype=dtype)
    return q, cache, cache, array(B), None if page_size is None else array(B, S // page_size)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_and_copies_no_cache(chip, name):
    B, S, special = COMPILED[name]
    special = dict(special)
    chunk_size, sharded = special.pop("chunk_size", None), special.pop("kv_offset", False)
    arguments = abstract_arguments(B, S, **special)

    def function(q, k, v, lengths, page_table, kv_offset):
        return decode_attention(
            q, k, v, lengths, chunk_size, page_table, kv_offset, return_lse=True, implementation="pallas"
        )

    offset = jax.ShapeDtypeStruct((), jnp.int32) if sharded else None
    compiled = compile_ahead(function, one_chip(chip), *arguments, offset)
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[1]))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * cache_bytes


@pytest.mark.tpu_aot
def test_auto_takes_the_kernel_on_a_tpu():
    mesh, arguments = one_chip("v6e"), abstract_arguments(4, 1024)
    assert "decode_attention" in compile_ahead(decode_attention, mesh, *arguments[:4]).as_text()
    q, k, *_ = (jax.ShapeDtypeStruct((*x.shape[:3], 64), x.dtype) for x in arguments[:2])
    assert "tpu_custom_call" not in compile_ahead(decode_attention, mesh, q, k, k, arguments[3]).as_text()


@pytest.mark.tpu_aot
def test_a_stack_of_caches_is_read_in_place():
    C, B, S, page_size = 4, 8, 8192, 512
    q, k, v, lengths, _ = abstract_arguments(B, S)
    k, v = (jax.ShapeDtypeStruct((C, *x.shape), x.dtype) for x in (k, v))

    def function(q, k, v, lengths):
        pages = [x.reshape(-1, page_size, *x.shape[3:]) for x in (k, v)]

        def layer(c, q):
            rows = c * B + jnp.arange(B, dtype=jnp.int32)
            table = rows[:, None] * (S // page_size) + jnp.arange(S // page_size, dtype=jnp.int32)
            return decode_attention(q, *pages, lengths, page_table=table, implementation="pallas")

        return jax.lax.fori_loop(0, C, layer, q)

    compiled = compile_ahead(function, one_chip("v6e"), q, k, v, lengths)
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.fixture
def interpreted_bytes(monkeypatch):
    """Sizes of the DMAs that interpreted kernels ran."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # what a DMA moved is not public

    sizes, execute = [], interpret_pallas_call.DMA.execute_read

    def record(dma):
        new = dma.data is None
        execute(dma)
        if new:
            sizes.append(dma.data_size)

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", record)
    return sizes


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    "case",
    [
        Case([300, 1, 0, 129]),
        Case([300, 9, 0, 129], slots=304, num_kv_heads=1),
        Case([320, 65, 0, 64], slots=320, page_size=64),
        Case([300, 1, 0, 129], slots=384, page_size=128, int8=True),
    ],
    ids=["full cache", "one kv head", "pages", "int8 pages"],
)
def test_bytes_read_are_those_of_the_dmas(interpreted_bytes, case):
    arrays, arguments = inputs(case, jnp.float32)
    tiles = Tiles(block_slots=128, num_splits=1)
    out, _ = tpu.attend(*arrays, arguments.get("page_table"), jnp.int32(0), None, 0.1, tiles, INTERPRET)
    jax.block_until_ready(out)
    dtype = jnp.dtype("int8" if case.int8 else "float32")
    assert sum(interpreted_bytes) == bytes_read(case.lengths, tiles, case.num_kv_heads, H, dtype, case.page_size)


@pytest.mark.parametrize(("dtype", "page_size"), [("bfloat16", None), ("bfloat16", 64), ("int8", None), ("int8", 128)])
def test_bytes_read_are_the_used_slots(dtype, page_size):
    lengths, dtype = np.random.default_rng(0).integers(2048, 131_072, 64).tolist(), jnp.dtype(dtype)
    scale_bytes = 4 if dtype == jnp.int8 else 0
    for num_kv_heads in (1, 8):
        table = None if page_size is None else jnp.zeros((64, 131_072 // page_size), jnp.int32)
        cache_shape = (64, page_size or 131_072, num_kv_heads, H)
        tiles = choose_tiles("TPU v6 lite", cache_shape, dtype, table)
        ideal = 2 * sum(lengths) * num_kv_heads * (H * dtype.itemsize + scale_bytes)
        assert ideal <= bytes_read(lengths, tiles, num_kv_heads, H, dtype, page_size) <= 1.01 * ideal


def test_tiles():
    bfloat16 = jnp.dtype("bfloat16")
    assert choose_tiles("TPU v6 lite", (64, 8192, 8, 128), bfloat16, None) == Tiles(512, 1)
    assert choose_tiles("TPU v5", (64, 8192, 8, 128), bfloat16, None) == Tiles(512, 2)
    assert choose_tiles("TPU7x", (64, 8192, 8, 128), jnp.dtype("int8"), None) == Tiles(2048, 1)
    assert choose_tiles("a chip that is not in the table", (64, 100, 8, 128), bfloat16, None) == Tiles(128, 1)
    table = jnp.zeros((64, 100), jnp.int32)
    assert choose_tiles("TPU v6 lite", (6400, 48, 8, 128), bfloat16, table) == Tiles(480, 1)
    assert choose_tiles("TPU v6 lite", (6400, 2048, 8, 128), bfloat16, table) == Tiles(2048, 1)
    assert choose_tiles("TPU v6 lite", (6400, 48, 8, 128), bfloat16, table[:, :2]) == Tiles(96, 1)
