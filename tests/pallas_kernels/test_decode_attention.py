"""Every implementation of decode attention against the specification, and that against plain attention."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    QuantizedArray,
    attention,
    decode_attention,
    dispatch,
    merge_partial_attention,
    quantize,
)
from pallas_kernels.decode_attention import tpu
from pallas_kernels.decode_attention.tiles import Tiles
from pallas_kernels.dispatch import implementations
from pallas_kernels.tpu import INTERPRET
from tests.pallas_kernels.helpers import assert_close, normal

pytestmark = pytest.mark.usefixtures("no_races")

ALL = [name for name in implementations("decode_attention") if name != "pallas"]  # needs a TPU
FAST = [name for name in ALL if name != "reference"]
K, H = 4, 128


class Case(NamedTuple):
    """One call on three sequences. Interpreted kernels cut 300 slots into three blocks of 128."""

    lengths: list[int]
    slots: int = 300
    num_queries: int = 1
    chunk_size: int | None = None
    page_size: int | None = None
    int8: bool = False
    kv_offset: int | list[int] | None = None
    num_kv_heads: int = K
    heads_per_kv_head: int = 2


CASES = {
    "full cache": Case([300, 1, 0]),
    "block edges": Case([128, 129, 127]),
    "a few queries": Case([2, 130, 300], num_queries=3),
    "one slot": Case([1, 0, 1], slots=1, num_kv_heads=8),
    "nothing": Case([0, 0, 0]),
    "ring": Case([32, 33, 1000], slots=32, chunk_size=32),
    "ring of several blocks": Case([302, 450, 600], chunk_size=300, num_queries=2),
    "cache shorter than a chunk": Case([200, 3, 0], slots=200, chunk_size=256),
    "pages": Case([320, 63, 129], slots=320, page_size=64),
    "pages that blocks cannot be cut into": Case([240, 48, 7], slots=240, page_size=48, num_queries=2),
    "ring of pages": Case([1000, 33, 384], slots=384, page_size=32, chunk_size=384),
    "shard": Case([301, 100, 900], kv_offset=[250, 101, 850], num_queries=2),
    "int8": Case([384, 100, 0], slots=384, int8=True),
    "int8, a few queries": Case([130, 2, 257], slots=384, int8=True, num_queries=3),
    "int8 ring": Case([1000, 384, 1], slots=384, int8=True, chunk_size=384),
    "int8 pages": Case([300, 1, 256], slots=384, int8=True, page_size=128),
    "one kv head": Case([300, 129, 1], slots=304, num_kv_heads=1, heads_per_kv_head=5),
    "two kv heads": Case([299, 130, 2], num_kv_heads=2, heads_per_kv_head=3, num_queries=2),
    "eight kv heads": Case([299, 130, 2], num_kv_heads=8, heads_per_kv_head=5),
    "sixteen kv heads": Case([99, 130, 0], slots=130, num_kv_heads=16, heads_per_kv_head=1),
    "int8, one kv head": Case([300, 129, 1], slots=384, num_kv_heads=1, int8=True),
}

# bfloat16 where kernels treat it in a way of its own: two heads share a word of memory, and int8 needs a conversion.
BFLOAT16_CASES = (
    *("full cache", "ring of several blocks", "int8, a few queries", "int8, one kv head"),
    *("one kv head", "two kv heads", "sixteen kv heads"),
)


def used_slots(case: Case, lengths) -> np.ndarray:
    """Which slots the queries see, bool [B, S], written down once more."""
    first = np.broadcast_to(case.kv_offset or 0, len(lengths))
    newest = np.array(lengths) - 1
    last = newest % case.chunk_size if case.chunk_size else newest - first
    return (np.arange(case.slots) <= last[:, None]) & (newest >= 0)[:, None]


def inputs(case: Case, dtype, lengths=None, poison: bool = True, seed: int = 0):
    """Returns the arguments of a call. With poison, everything that no query sees is NaN, or no page at all."""
    lengths = case.lengths if lengths is None else lengths
    B, S, heads = len(lengths), case.slots, case.num_kv_heads
    q, *caches = normal(
        seed, (B, case.num_queries, heads * case.heads_per_kv_head, H), *[(B, S, heads, H)] * 2, dtype=dtype
    )
    used = used_slots(case, lengths)
    unused = jnp.asarray(~used & poison)[:, :, None, None]
    if case.int8:
        caches = [quantize(x, jnp.int8, axis=-1) for x in caches]
        caches = [QuantizedArray(jnp.where(unused, 99, x.values), jnp.where(unused, jnp.nan, x.scales)) for x in caches]
    else:
        caches = [jnp.where(unused, jnp.nan, x).astype(dtype) for x in caches]
    arguments = {"chunk_size": case.chunk_size}
    if case.kv_offset is not None:
        arguments["kv_offset"] = jnp.asarray(case.kv_offset, jnp.int32)
    if case.page_size is not None:
        pages_per_row = S // case.page_size
        pages = np.random.default_rng(seed).permutation(B * pages_per_row).reshape(B, pages_per_row)
        caches = jax.tree.map(functools.partial(cut_into_pages, pages=pages, page_size=case.page_size), caches)
        used_pages = used.reshape(B, pages_per_row, case.page_size).any(2)
        nowhere = np.random.default_rng(seed).choice([-1, 1 << 30], pages.shape)
        arguments["page_table"] = jnp.asarray(np.where(used_pages | (not poison), pages, nowhere), jnp.int32)
    return (q, *caches, jnp.asarray(lengths, jnp.int32)), arguments


def cut_into_pages(cache, pages, page_size):
    parts = cache.reshape(-1, page_size, *cache.shape[2:])
    return jnp.zeros_like(parts).at[pages.reshape(-1)].set(parts)


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def decode(*arrays, implementation, **arguments):
    return decode_attention(*arrays, return_lse=True, implementation=implementation, **arguments)


def assert_equal_attention(results, expected, dtype):
    (out, lse), (expected_out, expected_lse) = results, expected
    seen = np.asarray(expected_lse > -jnp.inf)
    np.testing.assert_array_equal(np.asarray(lse > -jnp.inf), seen)
    assert_close([out, jnp.where(seen, lse, 0.0)], [expected_out, jnp.where(seen, expected_lse, 0.0)], dtype)
    assert not np.asarray(out)[~seen].any()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in BFLOAT16_CASES],
)
@pytest.mark.parametrize("implementation", FAST)
def test_equals_reference(implementation, name, dtype):
    arrays, arguments = inputs(CASES[name], dtype)
    expected = decode(*arrays, **arguments, implementation="reference")
    assert_equal_attention(decode(*arrays, **arguments, implementation=implementation), expected, dtype)


@pytest.mark.parametrize(
    "name", ["full cache", "ring of several blocks", "ring of pages", "int8", "int8 pages", "shard"]
)
@pytest.mark.parametrize("implementation", ALL)
def test_what_no_query_sees_may_be_anything(implementation, name):
    results = []
    for poison in (False, True):
        arrays, arguments = inputs(CASES[name], jnp.float32, poison=poison)
        results.append(decode(*arrays, **arguments, implementation=implementation))
    for clean, poisoned in zip(*results, strict=True):
        np.testing.assert_array_equal(clean, poisoned)


@pytest.mark.parametrize(("implementation", "examples"), [("xla", 25), ("interpret", 8)])
@pytest.mark.parametrize("name", ["full cache", "ring", "pages", "ring of pages", "int8 pages"])
def test_any_lengths(implementation, examples, name):
    check_any_lengths(implementation, examples, name)


def check_any_lengths(implementation, examples, name):
    case = CASES[name]

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        lengths=st.lists(st.integers(0, 1000 if case.chunk_size else case.slots), min_size=3, max_size=3),
        seed=st.integers(0, 100),
    )
    def check(lengths, seed):
        arrays, arguments = inputs(case, jnp.float32, lengths, seed=seed)
        expected = decode(*arrays, **arguments, implementation="reference")
        assert_equal_attention(decode(*arrays, **arguments, implementation=implementation), expected, jnp.float32)

    check()


@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("implementation", ALL)
def test_equals_the_end_of_full_attention(implementation, chunk_size):
    """A cache filled slot by slot holds what plain attention sees from the last tokens."""
    S, T = 150, 2
    q, k, v = normal(0, (3, S, 2 * K, H), (3, S, K, H), (3, S, K, H))
    expected = attention(q, k, v, chunk_size=chunk_size, return_lse=True, implementation="reference")
    for length in (2, 64, 66, 129, 131, 150):
        num_queries = 1 if chunk_size and length % chunk_size == 1 else T
        kept = np.arange(length)[-(chunk_size or length) :]  # a ring has no place for more
        slots = kept % (chunk_size or length)
        caches = [jnp.full((3, chunk_size or S, K, H), jnp.nan).at[:, slots].set(x[:, kept]) for x in (k, v)]
        newest = slice(length - num_queries, length)
        results = decode(
            q[:, newest], *caches, jnp.full(3, length), chunk_size=chunk_size, implementation=implementation
        )
        assert_equal_attention(results, [x[:, newest] for x in expected], jnp.float32)


@pytest.mark.parametrize("implementation", ALL)
def test_shards_merge_to_the_whole(implementation):
    """A cache that is cut along the sequence: one shard lies in the future of some sequences, one of all of them."""
    (q, k, v, lengths), _ = inputs(Case([300, 120, 0], num_queries=2), jnp.float32)
    whole = decode(q, k, v, lengths, implementation=implementation)
    padding, parts = ((0, 0), (0, 100), (0, 0), (0, 0)), []
    for start in (0, 100, 200, 300):
        shard = [jnp.pad(x, padding, constant_values=np.nan)[:, start : start + 100] for x in (k, v)]
        parts.append(decode(q, *shard, lengths, kv_offset=jnp.int32(start), implementation=implementation))
    assert jnp.isneginf(parts[-1][1]).all()
    assert_equal_attention(merge_partial_attention(*zip(*parts, strict=True)), whole, jnp.float32)


def test_splits_merge_to_the_whole():
    """The blocks of each sequence are shared by two programs, which run at the same time on a chip with two cores."""
    (q, k, v, lengths), _ = inputs(Case([300, 40, 0], num_queries=2), jnp.bfloat16)
    scale, offset = H**-0.5, jnp.int32(0)
    results = tpu.attend(q, k, v, lengths, None, offset, None, scale, Tiles(block_slots=64, num_splits=2), INTERPRET)
    assert_equal_attention(results, decode(q, k, v, lengths, implementation="reference"), jnp.bfloat16)


@pytest.mark.parametrize("name", ["full cache", "pages", "int8", "int8 pages"])
def test_the_cache_is_not_copied(name):
    case = CASES[name]._replace(slots=16384, lengths=[16384])
    arrays, arguments = jax.eval_shape(lambda: inputs_without_numpy(case))
    compiled = decode.lower(*arrays, **arguments, implementation="xla").compile()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays[1:3]))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * cache_bytes


def inputs_without_numpy(case: Case, dtype=jnp.bfloat16):
    B, page_size = len(case.lengths), case.page_size or case.slots
    num_pages = B * case.slots // page_size
    cache = jnp.zeros((num_pages, page_size, K, H), dtype)
    cache = quantize(cache, jnp.int8, axis=-1) if case.int8 else cache
    q = jnp.zeros((B, 1, 2 * K, H), dtype)
    arguments = {"page_table": jnp.zeros((B, num_pages), jnp.int32)} if case.page_size else {}
    return (q, cache, cache, jnp.zeros(B, jnp.int32)), arguments


def test_quantized_heads_are_close_and_zeros_stay_zeros():
    (x,) = normal(0, (2, 5, K, H))
    x = x.at[0, 0].set(0)
    quantized = quantize(x, jnp.int8, axis=-1)
    assert (quantized.shape, quantized.ndim, quantized.scales.shape) == (x.shape, 4, (2, 5, K, 1))
    error = jnp.abs(quantized.dequantize(jnp.dtype("float32")) - x)
    assert (error <= 0.5001 * quantized.scales).all()
    assert not error[0, 0].any()
    assert (jnp.abs(quantized.values).max(-1)[1] == 127).all()


def test_auto_never_interprets():
    (q, k, v, lengths), _ = inputs(CASES["full cache"], jnp.float32)
    auto = decode(q, k, v, lengths, implementation="auto")
    for a, b in zip(auto, decode(q, k, v, lengths, implementation="xla"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arguments_that_do_not_fit_are_refused():
    q, cache, lengths = jnp.ones((2, 1, 8, H)), jnp.ones((2, 96, K, H)), jnp.ones(2, jnp.int32)
    table = jnp.zeros((2, 4), jnp.int32)
    int8 = quantize(cache, jnp.int8, axis=-1)

    def refused(match, q=q, k=cache, v=cache, lengths=lengths, **arguments):
        with pytest.raises(ValueError, match=match):
            decode_attention(q, k, v, lengths, **arguments)

    refused("page_size=96 does not divide chunk_size=400", page_table=table, chunk_size=400)
    refused("4 pages of 384 slots is larger than chunk_size=96", page_table=table, chunk_size=96)
    refused("a cache of 2 sequences for 1", q=q[:1], lengths=lengths[:1])
    refused("kv_offset is for caches", chunk_size=96, kv_offset=jnp.int32(0))
    refused("expected int8 and float32", k=QuantizedArray(cache, cache), v=int8)
    refused("one per head", k=QuantizedArray(int8.values, int8.scales[..., 0]), v=int8)
    refused("one dtype", k=cache.astype(jnp.bfloat16))
    refused("scale=-1", scale=-1.0)
    refused("'pallas' cannot serve this call: a Mosaic kernel needs a TPU", implementation="pallas")
    refused("keys are int8 and values float32", k=int8, implementation="interpret")
    refused("96 slots are not a multiple of 128", k=int8, v=int8, implementation="interpret")
    refused("96 slots in a page", k=int8, v=int8, page_table=table, implementation="interpret")
    refused("100 tokens with 2 queries", q=jnp.ones((2, 100, 8, H)), implementation="interpret")
    refused("an array is empty", q=q[:, :0], implementation="interpret")
    narrow = jnp.ones((2, 96, K, 64))
    refused("head_dim=64", q=q[..., :64], k=narrow, v=narrow, implementation="interpret")
    odd = jnp.ones((2, 96, 3, H))
    refused("3 key/value heads", q=jnp.ones((2, 1, 6, H)), k=odd, v=odd, implementation="interpret")
    many = jnp.zeros((2, 200_000), jnp.int32)
    refused("400000 entries does not fit", page_table=many, implementation="interpret")
    page = jnp.ones((1, 4096, 8, H))
    refused("page of 4096 slots is larger than 8 MiB", k=page, v=page, page_table=table, implementation="interpret")


def test_order_of_implementations():
    assert dispatch.implementations("decode_attention") == ("pallas", "xla", "interpret", "reference")
