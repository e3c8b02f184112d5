"""Gradients from parts of the keys: they add up to those of attention to all of them, which jax derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, attention_gradients
from tests.pallas_kernels.helpers import assert_close, normal

IMPLEMENTATIONS = ["xla", "reference", "interpret"]


def case(head_dim: int):
    B, T, N, K = 2, 40, 4, 2
    q, k, v, d_out, d_lse = normal(0, (B, T, N, head_dim), *[(B, T, K, head_dim)] * 2, (B, T, N, head_dim), (B, T, N))
    segments = jnp.asarray(np.repeat([[1] * 23 + [2] * 14 + [0] * 3], B, axis=0), jnp.int32)
    positions = jnp.asarray(np.repeat([[*range(23), *range(14), 0, 0, 0]], B, axis=0), jnp.int32)
    return q, k, v, d_out, d_lse, positions, segments


@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_add_up_to_the_gradient_of_attention(implementation, chunk_size, no_races):
    q, k, v, d_out, d_lse, positions, segments = case(128 if implementation == "interpret" else 16)
    seen = {"q_positions": positions, "q_segment_ids": segments, "chunk_size": chunk_size}

    def whole(q, k, v):
        return attention(
            q,
            k,
            v,
            kv_positions=positions,
            kv_segment_ids=segments,
            return_lse=True,
            implementation="reference",
            **seen,
        )

    (out, lse), backward = jax.vjp(whole, q, k, v)
    real = segments[..., None] > 0
    expected = backward((d_out, jnp.where(real, d_lse, 0.0)))
    parts = [slice(0, 13), slice(13, 40)]
    found = [
        attention_gradients(
            q, k[:, s], v[:, s], out, lse, d_out, jnp.where(real, d_lse, 0.0), kv_positions=positions[:, s],
            kv_segment_ids=segments[:, s], implementation=implementation, **seen,
        )
        for s in parts
    ]  # fmt: skip
    d_q = sum(d_q for d_q, _, _ in found)
    d_k, d_v = (jnp.concatenate([part[i] for part in found], axis=1) for i in (1, 2))
    assert_close((d_q, d_k, d_v), expected, jnp.float32)
