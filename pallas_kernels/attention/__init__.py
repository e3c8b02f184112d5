"""Attention for training and prefill: causal, chunked, packed documents, explicit positions, grouped queries.

The mask is never an array: it follows from positions and segment ids, so whole blocks outside of it cost nothing.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference, tpu, xla
from pallas_kernels.dispatch import dispatch, register

register("attention", "pallas", tpu.attention, tpu.refuse)
register("attention", "xla", xla.attention)
register("attention", "interpret", functools.partial(tpu.attention, interpret=True), tpu.refuse_interpreted)
register("attention", "reference", reference.attention)
register("attention_gradients", "pallas", tpu.attention_gradients, tpu.refuse)
register("attention_gradients", "xla", xla.attention_gradients)
register(
    "attention_gradients",
    "interpret",
    functools.partial(tpu.attention_gradients, interpret=True),
    tpu.refuse_interpreted,
)
register("attention_gradients", "reference", reference.attention_gradients)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    causal: bool = True,
    chunk_size: int | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns `softmax(scale * q @ k) @ v` over the keys that each query may see.

    Query t sees key s iff their segment ids are equal and not 0 (0 is padding), and, if `causal`,
    `kv_position <= q_position`, and, if chunked, `kv_position // chunk_size == q_position // chunk_size`.
    A query that sees nothing returns zeros and a log-sum-exp of -inf. Differentiable in q, k and v, through both
    results.

    Args:
        q_BTNH: queries, float32 or bfloat16. N is a multiple of K; query head n reads kv head `n // (N // K)`.
        k_BSKH: keys, in the dtype of the queries.
        v_BSKH: values, in the dtype of the queries.
        causal: whether later positions are hidden.
        chunk_size: tokens per chunk; None means one chunk.
        q_positions: position of each query in its document; None means 0..T-1.
        kv_positions: position of each key in its document; None means 0..S-1.
        q_segment_ids: document of each query; None means one document.
        kv_segment_ids: document of each key; None means one document (id 1).
        scale: positive factor on the scores, a Python number; None means `H ** -0.5`.
        return_lse: whether to return the log-sum-exp of the scores as well (for `merge_partial_attention`).
        implementation: "auto", or a name from `dispatch.implementations("attention")`.

    Returns:
        out_BTNH in the dtype of q; with `return_lse` the pair (out_BTNH, lse_BTN), lse in float32.

    Raises:
        ValueError: shapes or dtypes disagree, or the named implementation cannot serve the call.
    """
    if scale is None:
        scale = q_BTNH.shape[-1] ** -0.5
    _check(q_BTNH, k_BSKH, v_BSKH, chunk_size, scale)
    out_BTNH, lse_BTN = dispatch(
        "attention", implementation, q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, q_segment_ids, kv_segment_ids,
        causal, chunk_size, scale,
    )  # fmt: skip
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def attention_gradients(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    out_BTNH: Float[Array, "B T N H"],
    lse_BTN: Float[Array, "B T N"],
    d_out_BTNH: Float[Array, "B T N H"],
    d_lse_BTN: Float[Array, "B T N"],
    causal: bool = True,
    chunk_size: int | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the part of the gradients of attention that comes from some of its keys.

    Where keys are spread over devices, `out` and `lse` are of all of them. The gradients of the queries then add up
    over the parts, and each part gives those of its own keys and values. With all keys at once it is the gradient of
    `attention`.

    Args:
        q_BTNH: as for `attention`, as are k_BSKH, v_BSKH and all from `causal` on.
        out_BTNH: attention to all keys.
        lse_BTN: its log-sum-exp.
        d_out_BTNH: gradient of a loss with respect to `out`.
        d_lse_BTN: and to `lse`.

    Returns:
        The gradients of q, k and v, in their dtypes.

    Raises:
        ValueError: shapes or dtypes disagree, or the named implementation cannot serve the call.
    """
    if scale is None:
        scale = q_BTNH.shape[-1] ** -0.5
    _check(q_BTNH, k_BSKH, v_BSKH, chunk_size, scale)
    given = q_positions, kv_positions, q_segment_ids, kv_segment_ids
    return dispatch(
        "attention_gradients", implementation, q_BTNH, k_BSKH, v_BSKH, given, out_BTNH, lse_BTN, d_out_BTNH, d_lse_BTN,
        causal, chunk_size, scale,
    )  # fmt: skip


def merge_partial_attention(
    outs: Sequence[Float[Array, "B T N H"]], lses: Sequence[Float[Array, "B T N"]]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Returns attention over the union of disjoint key sets, from attention over each of them.

    Exact: `out = sum_i exp(lse_i - lse) * out_i` with `lse = log(sum_i exp(lse_i))`. Parts where a query saw nothing
    (lse -inf) weigh nothing.

    Args:
        outs: the parts' outputs.
        lses: the parts' float32 log-sum-exps.

    Returns:
        (out_BTNH in the dtype of the first part, lse_BTN in float32).
    """
    lses_PBTN = jnp.stack(lses)
    largest_BTN = jnp.max(lses_PBTN, 0)
    # Where no part saw anything, subtract 0: -inf - -inf would be NaN.
    shares_PBTN = jnp.exp(lses_PBTN - jnp.where(jnp.isneginf(largest_BTN), 0.0, largest_BTN))
    total_BTN = shares_PBTN.sum(0)
    safe_total_BTN = jnp.where(total_BTN > 0, total_BTN, 1.0)
    out = sum(
        (share / safe_total_BTN)[..., None] * part.astype(jnp.float32)
        for share, part in zip(shares_PBTN, outs, strict=True)
    )
    return out.astype(outs[0].dtype), largest_BTN + jnp.log(safe_total_BTN)


def _check(q: Array, k: Array, v: Array, chunk_size: int | None, scale: float) -> None:
    if k.shape != v.shape or q.ndim != 4 or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"expected q [B,T,N,H], k and v [B,S,K,H]; got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for no chunks")
    if scale <= 0:
        raise ValueError(f"scale={scale} must be positive")
