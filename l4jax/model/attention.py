"""Attention of the text decoder, in its two kinds.

Layers *with* rotary positions attend inside chunks and may normalise queries and keys; layers *without* see everything
before them and scale the query by a temperature that grows with the position (iRoPE). Masks come from document
positions and segment ids in every mode: training, prefill in pieces, decoding.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from l4jax import ops
from l4jax.config import TextConfig
from l4jax.model.cache import LayerCache
from l4jax.model.linear import Linear
from l4jax.model.norm import rms_normalize
from l4jax.model.rope import rotate, text_angles
from l4jax.sharding import constrain


@partial(jax.tree_util.register_dataclass, meta_fields=["aligned", "balanced"], data_fields=[
    "positions", "segment_ids", "cos", "sin", "temperature", "cached_lengths"
])  # fmt: skip
@dataclass(frozen=True)
class Tokens:
    """What every layer needs to know about the tokens besides their vectors; computed once a forward pass."""

    positions: Int[Array, "B T"]
    """Position in the document, never the index in a packed or padded row."""
    segment_ids: Int[Array, "B T"] | None
    """Which document of the row a token belongs to; 0 is padding. None: one document, no padding."""
    cos: Float[Array, "B T h"]
    sin: Float[Array, "B T h"]
    temperature: Float[Array, "B T"]
    cached_lengths: Int[Array, "B"] | None
    """Tokens that the cache holds before these; None without a cache."""
    aligned: bool = False
    """Whether position p is the p-th token of every row."""
    balanced: bool = False
    """Whether rows that are split over devices lie in balanced order (`ops/self_attention.py`)."""

    @classmethod
    def create(cls, config: TextConfig, positions, segment_ids, cached_lengths, **layout: bool) -> "Tokens":
        angles = text_angles(config, positions)
        cos, sin, factor = jnp.cos(angles), jnp.sin(angles), temperature(config, positions)
        return cls(positions, segment_ids, cos, sin, factor, cached_lengths, **layout)

    @property
    def valid(self) -> Array:
        """Which tokens are not padding, bool [B, T]."""
        return jnp.ones(self.positions.shape, bool) if self.segment_ids is None else self.segment_ids > 0


def temperature(config: TextConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)), float32; 1 everywhere if tuning is off.

    Positions stay integers until after the division: bfloat16 rounds 8176 up to 8192 and would step too early.
    """
    if not config.attn_temperature_tuning:
        return jnp.ones(positions.shape, jnp.float32)
    steps = (positions + 1) // config.floor_scale
    return 1.0 + config.attn_scale * jnp.log1p(steps.astype(jnp.float32))


class Attention(nnx.Module):
    def __init__(self, config: TextConfig, *, use_rope: bool, rngs: nnx.Rngs, dtype):
        width, num_heads, num_kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        queries, keys = (width, num_heads, config.head_dim), (width, num_kv_heads, config.head_dim)
        self.q_proj = Linear("BTD,DNH->BTNH", queries, ("embed", "heads", None), rngs=rngs, dtype=dtype)
        self.k_proj = Linear("BTD,DKH->BTKH", keys, ("embed", "kv_heads", None), rngs=rngs, dtype=dtype)
        self.v_proj = Linear("BTD,DKH->BTKH", keys, ("embed", "kv_heads", None), rngs=rngs, dtype=dtype)
        out = (num_heads, config.head_dim, width)
        self.o_proj = Linear("BTNH,NHD->BTD", out, ("heads", None, "embed"), rngs=rngs, dtype=dtype)
        self.use_rope = use_rope
        self.chunk_size = config.attention_chunk_size if use_rope else None
        self.norm_epsilon = config.rms_norm_eps if use_rope and config.use_qk_norm else None

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, cache: LayerCache | None, index: int | Array
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        q = constrain(self.q_proj(x), "batch", "length", "heads", None)
        k, v = (constrain(project(x), "batch", "length", "kv_heads", None) for project in (self.k_proj, self.v_proj))
        if self.use_rope:
            q, k = rotate(q, tokens.cos, tokens.sin), rotate(k, tokens.cos, tokens.sin)
            if self.norm_epsilon is not None:
                # Per head and without a weight; a rotation keeps the length, so only rounding depends on the order.
                q, k = rms_normalize(q, self.norm_epsilon), rms_normalize(k, self.norm_epsilon)
        else:
            q = (q.astype(jnp.float32) * tokens.temperature[:, :, None, None]).astype(q.dtype)

        if cache is None:
            out = self._attend(q, k, v, tokens, tokens.segment_ids)
        elif x.shape[1] == 1:
            cache = cache.write(index, k, v, tokens.positions, tokens.valid, self.chunk_size)
            lengths = jnp.where(tokens.valid, tokens.positions + 1, 0)[:, 0]
            out = ops.decode_attention(q, cache.k, cache.v, index, lengths, self.chunk_size)
        else:
            out = self._prefill(q, k, v, tokens, cache, index)
            cache = cache.write(index, k, v, tokens.positions, self._last_chunk(tokens), self.chunk_size)
        return self.o_proj(out), cache

    def _attend(self, q, k, v, tokens: Tokens, segment_ids, return_lse: bool = False):
        return ops.attention(
            q,
            k,
            v,
            tokens.positions,
            segment_ids,
            chunk_size=self.chunk_size,
            aligned=tokens.aligned,
            balanced=tokens.balanced,
            return_lse=return_lse,
        )

    def _prefill(self, q, k, v, tokens: Tokens, cache: LayerCache, index):
        """New tokens see what the cache holds and one another; the two parts merge by their log-sum-exp."""
        segment_ids = tokens.valid.astype(jnp.int32)
        past = ops.attention_to_slots(
            q, cache.k, cache.v, index, tokens.positions, segment_ids, tokens.cached_lengths, self.chunk_size
        )
        new = self._attend(q, k, v, tokens, segment_ids, return_lse=True)
        out, _ = ops.merge_partial_attention([past[0], new[0]], [past[1], new[1]])
        return out

    def _last_chunk(self, tokens: Tokens):
        """Which new tokens the cache has to keep: in a chunked layer those of each row's last chunk."""
        if self.chunk_size is None:
            return tokens.valid
        last = jnp.max(jnp.where(tokens.valid, tokens.positions, 0), axis=1, keepdims=True)
        return tokens.valid & (tokens.positions // self.chunk_size == last // self.chunk_size)
