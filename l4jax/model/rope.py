"""Rotary positions: interleaved pairs (x[2i], x[2i+1]), as in Meta's code and in the released weights of Hugging Face.

Angles are float32 always: bfloat16 angles are wrong from about position 256 on.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from l4jax.config import RopeScaling, TextConfig, VisionConfig


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns the angle that each pair turns per position, float32 [H/2] (HF `_compute_llama3_parameters`)."""
    inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        low, high, old_length = (
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )
        turns = old_length * inv_freq / (2 * math.pi)  # in the original context
        # With high == low (Scout) the band in between is empty; the maximum only avoids 0/0.
        blend = np.clip((turns - low) / max(high - low, 1e-30), 0.0, 1.0)
        inv_freq = np.where(
            turns > high, inv_freq, np.where(turns < low, inv_freq / scaling.factor, _mix(inv_freq, scaling, blend))
        )
    return inv_freq.astype(np.float32)


def _mix(inv_freq, scaling, blend):
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq


def text_angles(config: TextConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T h"]:
    """Returns the angles [B, T, H/2] of the layers with rotary positions.

    Attention there sees one chunk only and depends on differences of positions, so `position % chunk` gives the same
    result; it stays exact at ten million tokens, where float32 angles of absolute positions are off by half a radian.
    """
    if config.attention_chunk_size is not None:
        positions = positions % config.attention_chunk_size
    inv_freq = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return positions.astype(jnp.float32)[..., None] * inv_freq


def vision_angles(config: VisionConfig) -> np.ndarray:
    """Returns the angles [X + 1, H/2] of one tile's patches, row-major, then the class token, which does not turn.

    The first half of the pairs turns by the column, the second by the row; both count from 1.
    """
    side = config.patches_per_side
    inv_freq = config.rope_theta ** (-np.arange(0, config.head_dim // 2, 2) / (config.head_dim // 2))
    row, column = np.divmod(np.arange(side * side), side)
    angles = np.concatenate([(column + 1)[:, None] * inv_freq, (row + 1)[:, None] * inv_freq], axis=1)
    return np.concatenate([angles, np.zeros((1, config.head_dim // 2))]).astype(np.float32)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T h"], sin: Float[Array, "#B T h"]
) -> Float[Array, "B T N H"]:
    """Turns each pair of the last dimension by its angle; computed in float32, returned in the dtype of `x`."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
