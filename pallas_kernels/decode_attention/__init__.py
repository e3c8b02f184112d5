"""Attention of one or a few new tokens per sequence against a long cache; costs what is used, not what is allocated."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import gpu, reference, tpu, xla
from pallas_kernels.dispatch import by_platform, dispatch, register
from pallas_kernels.quantized import QuantizedArray

register(
    "decode_attention",
    "pallas",
    *by_platform(tpu=(tpu.decode_attention, tpu.refuse), gpu=(gpu.decode_attention, gpu.refuse)),
)
register("decode_attention", "xla", xla.decode_attention)
register("decode_attention", "interpret", tpu.decode_attention_interpreted, tpu.refuse_arguments)
register("decode_attention", "reference", reference.decode_attention)


def decode_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_cache: Float[Array, "_ _ K H"] | QuantizedArray,
    v_cache: Float[Array, "_ _ K H"] | QuantizedArray,
    lengths_B: Int[Array, " B"],
    chunk_size: int | None = None,
    page_table: Int[Array, "B _"] | None = None,
    kv_offset: Int[Array, ""] | Int[Array, " B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns the attention of the newest T tokens of each sequence over its cache, which already holds them.

    Query t has position `p = lengths_B - T + t`, and sees the slots of its sequence that hold positions up to p:

    - Plain: slot s holds position s.
    - A shard of a cache that is cut along the sequence: slot s holds position `kv_offset + s`. The results of all
      shards merge exactly with `merge_partial_attention`; a shard that lies in the future gives zeros and -inf.
    - A ring, with `chunk_size`: slot s holds the newest position with `position % chunk_size == s`, and what lies
      before the chunk of p is hidden. The T new tokens must lie in one chunk (T = 1 always does).

    A stack of caches [C, B, S, K, H], one for each layer, can be read in place as pages of a divisor of S: page i of
    sequence b in layer c is page `(c * B + b) * (S // page_size) + i`. A slice of the stack would be a copy on TPUs,
    whose kernels take whole arrays.

    A query whose position is negative (length 0: an idle row) returns zeros. What slots that no query sees hold does
    not matter, nor do entries of the page table for pages without such slots. Not differentiable: training uses
    `attention`.

    Args:
        q_BTNH: queries, float32 or bfloat16. N is a multiple of K; query head n reads kv head `n // (N // K)`.
        k_cache: cached keys [B, S, K, H] in the dtype of the queries, or a `QuantizedArray` with int8 values
            [B, S, K, H] and float32 scales [B, S, K, 1]. With a page table the first two dimensions are pages of all
            sequences, [num_pages, page_size, K, H]. With chunks a sequence has at most `chunk_size` slots.
        v_cache: cached values, like the keys.
        lengths_B: tokens of each sequence so far, the new ones included.
        chunk_size: tokens per chunk; None means that the cache holds every position.
        page_table: int32 [B, P]; page i of a sequence holds its slots from `i * page_size` on. None: no pages.
        kv_offset: int32, one number or one per sequence: position of slot 0. None means 0. Not with chunks.
        scale: positive factor on the scores, a Python number; None means `H ** -0.5`.
        return_lse: whether to return the log-sum-exp of the scores as well.
        implementation: "auto", or a name from `dispatch.implementations("decode_attention")`.

    Returns:
        out_BTNH in the dtype of q, scores and sums are float32 inside; with `return_lse` the pair (out_BTNH, lse_BTN),
        lse in float32 and -inf where a query sees nothing.

    Raises:
        ValueError: shapes or dtypes disagree, or the named implementation cannot serve the call.
    """
    _check(q_BTNH, k_cache, v_cache, chunk_size, page_table, kv_offset)
    if scale is None:
        scale = q_BTNH.shape[-1] ** -0.5
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive")
    if kv_offset is None:
        kv_offset = jnp.zeros((), jnp.int32)
    out_BTNH, lse_BTN = dispatch(
        "decode_attention", implementation, q_BTNH, k_cache, v_cache, lengths_B, page_table, kv_offset,
        chunk_size, scale,
    )  # fmt: skip
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def _check(q, k_cache, v_cache, chunk_size, page_table, kv_offset) -> None:
    B, _, N, H = q.shape
    if k_cache.shape != v_cache.shape or k_cache.ndim != 4 or k_cache.shape[3] != H:
        raise ValueError(f"expected q [B,T,N,H], caches [B,S,K,H]; got {q.shape}, {k_cache.shape} and {v_cache.shape}")
    num_rows, slots, K, _ = k_cache.shape
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} key/value heads")
    for cache in (k_cache, v_cache):
        _check_dtype(cache, q.dtype)
    if page_table is None:
        if num_rows != B:
            raise ValueError(f"a cache of {num_rows} sequences for {B} sequences of queries; pages need a page_table")
        what, slots_per_sequence = "a cache", slots
    else:
        if page_table.shape[0] != B:
            raise ValueError(f"the page table has {page_table.shape[0]} rows, there are {B} sequences of queries")
        if chunk_size is not None and chunk_size % slots:
            raise ValueError(f"page_size={slots} does not divide chunk_size={chunk_size}: a page would hold two chunks")
        what, slots_per_sequence = f"{page_table.shape[1]} pages", slots * page_table.shape[1]
    if chunk_size is not None and slots_per_sequence > chunk_size:
        raise ValueError(
            f"{what} of {slots_per_sequence} slots is larger than chunk_size={chunk_size}; a chunk needs no more"
        )
    if chunk_size is not None and kv_offset is not None:
        raise ValueError("kv_offset is for caches that hold every position; the slots of a chunk are not sharded")


def _check_dtype(cache: Array | QuantizedArray, dtype: jnp.dtype) -> None:
    if isinstance(cache, QuantizedArray):
        if cache.values.dtype != jnp.int8 or cache.scales.dtype != jnp.float32:
            raise ValueError(f"expected int8 and float32 scales; got {cache.values.dtype} and {cache.scales.dtype}")
        if cache.scales.shape != (*cache.shape[:3], 1):
            raise ValueError(f"scales have shape {cache.scales.shape}; with values {cache.shape} it is one per head")
    elif cache.dtype != dtype:
        raise ValueError(f"q and the caches must have one dtype, or the caches int8; got {dtype} and {cache.dtype}")
