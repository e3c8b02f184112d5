"""Attention of one or a few new tokens per sequence against a long cache; costs what is used, not what is allocated."""

from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention import reference, xla
from pallas_kernels.dispatch import dispatch, register

register("decode_attention", "xla", xla.decode_attention)
register("decode_attention", "reference", reference.decode_attention)


def decode_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_cache_BSKH: Float[Array, "B S K H"],
    v_cache_BSKH: Float[Array, "B S K H"],
    lengths_B: Int[Array, " B"],
    chunk_size: int | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Returns the attention of the newest T tokens of each sequence over its cache, which already holds them.

    Query t has position `p = lengths_B - T + t`. Without chunks slot s holds position s, and query t sees slots 0..p.
    With chunks the cache holds the current chunk only: slot s holds the newest position with
    `position % chunk_size == s`, and query t sees slots `0..p % chunk_size`; the T new tokens must then lie in one
    chunk (T = 1 always does).
    A query whose position is negative (length 0: an idle row) returns zeros. What a slot that no query sees holds does
    not matter. Not differentiable: training uses `attention`.

    Args:
        q_BTNH: queries, float32 or bfloat16. N is a multiple of K; query head n reads kv head `n // (N // K)`.
        k_cache_BSKH: cached keys, in the dtype of the queries. With chunks, S is at most `chunk_size`.
        v_cache_BSKH: cached values, in the dtype of the queries.
        lengths_B: tokens of each sequence so far, the new ones included.
        chunk_size: tokens per chunk; None means that the cache holds every position.
        scale: positive factor on the scores, a Python number; None means `H ** -0.5`.
        implementation: "auto", or a name from `dispatch.implementations("decode_attention")`.

    Returns:
        out_BTNH in the dtype of q; scores and sums are float32 inside.

    Raises:
        ValueError: shapes or dtypes disagree, or the named implementation cannot serve the call.
    """
    q, k, v = q_BTNH, k_cache_BSKH, v_cache_BSKH
    if k.shape != v.shape or q.ndim != 4 or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"expected q [B,T,N,H], caches [B,S,K,H]; got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q and the caches must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if chunk_size is not None and k.shape[1] > chunk_size:
        raise ValueError(f"a cache of {k.shape[1]} slots is larger than chunk_size={chunk_size}; a chunk needs no more")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive")
    return dispatch("decode_attention", implementation, q, k, v, lengths_B, chunk_size, scale)
