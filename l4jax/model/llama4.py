"""Llama 4: the whole model, in one definition for training, prefill and decoding. Read this file first.

What sets it apart from Llama 3:
- three of four layers rotate positions and attend inside chunks of 8,192 tokens; the fourth has no positions, sees
  everything, and scales its queries by a temperature that grows with the position (`attention.py`);
- experts: a sigmoid router picks one of many for each token, a shared one serves all, and the router's score multiplies
  the expert's input (`moe.py`);
- early fusion: pictures become tiles, tiles become rows that stand in for `<|patch|>` tokens (`vision.py`).

A mode is a difference of inputs. Without a cache, rows may hold several packed documents (training, scoring). With a
cache, each row continues one document: many tokens prefill, one token decodes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from l4jax import ops
from l4jax.config import Llama4Config
from l4jax.model.attention import Tokens
from l4jax.model.block import Block
from l4jax.model.cache import Cache, LayerCache
from l4jax.model.linear import Linear, einsum, param
from l4jax.model.moe import Routing
from l4jax.model.norm import RMSNorm
from l4jax.model.stack import Layers, Stack
from l4jax.model.vision import VisionModel
from l4jax.sharding import constrain, named_sharding

# XLA:CPU copies the weights that a scan slices (a quarter of the time); beyond this depth compile time matters more.
MAX_UNROLLED_LAYERS = 16


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, width: int, *, rngs: nnx.Rngs, dtype):
        self.embedding = param(rngs, (vocab_size, width), ("vocab", "embed"), dtype, fan_in=width)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embedding[...][ids]


class Projector(nnx.Module):
    """From the width of picture features to that of the text."""

    def __init__(self, width_in: int, width_out: int, *, rngs: nnx.Rngs, dtype):
        self.linear_1 = Linear("BXD,DF->BXF", (width_in, width_out), (None, "embed"), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "n x d"]) -> Float[Array, "n x D"]:
        return self.linear_1(x)


class Llama4(nnx.Module):
    """A Llama 4 model as a tree of parameters; nothing is mutated when it is called.

    Args:
        config: the architecture.
        rngs: draws the initial weights.
        dtype: of parameters and of the residual stream.
        scan_layers: stack layers and scan over them, or give each its own weights. Default: scan, except on a CPU with
            few layers.
    """

    def __init__(self, config: Llama4Config, *, rngs: nnx.Rngs, dtype=jnp.float32, scan_layers: bool | None = None):
        text, vision = config.text_config, config.vision_config
        if scan_layers is None:
            scan_layers = ops.platform() != "cpu" or text.num_hidden_layers > MAX_UNROLLED_LAYERS
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, rngs=rngs, dtype=dtype)

        def make_block(layer, rngs):
            return Block(text, layer, rngs=rngs, dtype=dtype)

        self.layers = Stack(make_block, text.num_hidden_layers, text.cycle_length, scan=scan_layers, rngs=rngs)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype=dtype)
        head = (text.hidden_size, text.vocab_size)
        self.lm_head = Linear("BTD,DV->BTV", head, ("embed", "vocab"), rngs=rngs, dtype=dtype)
        if vision is not None:
            self.vision_model = VisionModel(vision, scan=scan_layers, rngs=rngs, dtype=dtype)
            self.multi_modal_projector = Projector(vision.vision_output_dim, text.hidden_size, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        *,
        logits_at: Int[Array, "B"] | None = None,
        **inputs,
    ) -> tuple[Float[Array, "B t V"], Cache | None]:
        """Returns float32 logits [B, T, V] and the cache that now includes `ids` (None without one).

        Args:
            ids: tokens. The k-th `<|patch|>` of a row of the batch is replaced by its k-th row of picture features.
            logits_at: index of the one token in each row whose logits are wanted; the result is then [B, 1, V].
            inputs: those of `hidden`.
        """
        x, cache, _ = self.hidden(ids, **inputs)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
        return head_logits(x, self.lm_head.kernel[...]), cache

    def hidden(
        self,
        ids: Int[Array, "B T"],
        *,
        tiles: Float[Array, "B n 3 S S"] | None = None,
        image_features: Float[Array, "B R D"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        router_bias: Float[Array, "L E"] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], Cache | None, Routing | None]:
        """Returns what the head multiplies, the cache, and what the router of each mixture layer did, stacked.

        Training takes this and never holds the logits of all tokens at once; a dense model has no routers (None).

        Args:
            ids: tokens.
            tiles: pictures of each row in [-1, 1], those that no token asks for last; or
            image_features: what `encode_tiles` gave of them, the first for the first `<|patch|>` in `ids`.
            positions: of each token in its document. Default: counted from the start of each segment, or from the end
                of what the cache holds.
            segment_ids: 0 for padding, on any side. Without a cache other numbers tell packed documents apart.
            cache: made by `init_cache`; donate it when you jit.
            router_bias: for each mixture layer, added to the router's logits when it chooses, not when it scores.
            remat: what layers keep for the backward pass, a name in `stack.REMAT`.
        """
        text = self.config.text_config
        cached_lengths = None if cache is None else cache.lengths
        aligned = cache is None and positions is None and segment_ids is None
        if positions is None:
            positions = default_positions(ids.shape, segment_ids, cached_lengths)
        x = self.embed(ids, self.encode_tiles(tiles, remat) if tiles is not None else image_features)
        balanced = cache is None and ops.is_balanced(ids.shape[1])
        if balanced:
            x, positions = ops.to_balanced(x, None), ops.to_balanced(positions)
            segment_ids = None if segment_ids is None else ops.to_balanced(segment_ids)
        tokens = Tokens.create(text, positions, segment_ids, cached_lengths, aligned=aligned, balanced=balanced)

        def apply(block, x, layer_cache, index, bias):
            return block(x, tokens, layer_cache, index, bias)

        states = None if cache is None else cache.layers
        x, layers, routings = self.layers(apply, x, states, self._arrange_router_bias(router_bias), remat)
        if cache is not None:
            cache = Cache(layers, cache.lengths + tokens.valid.sum(axis=1, dtype=cache.lengths.dtype))
        routings = [routing for routing in self.layers.flatten(routings) if routing is not None]
        routing = jax.tree.map(lambda *layers: jnp.stack(layers), *routings) if routings else None
        x = self.norm(x)
        return ops.to_natural(x, None) if balanced else x, cache, routing

    def encode_tiles(self, tiles: Float[Array, "B n 3 S S"], remat: str = "none") -> Float[Array, "B R D"]:
        """Returns picture features in the width of the text: `tokens_per_tile` rows a tile, in order."""
        features = self.multi_modal_projector(self.vision_model(tiles.reshape(-1, *tiles.shape[2:]), remat))
        return constrain(features.reshape(tiles.shape[0], -1, features.shape[-1]), "batch", None, None)

    def embed(self, ids: Int[Array, "B T"], image_features: Float[Array, "B R D"] | None) -> Float[Array, "B T D"]:
        """Returns token vectors, with picture features in place of `<|patch|>` tokens."""
        x = self.embed_tokens(ids)
        if image_features is not None:
            is_patch = ids == self.config.image_token_index
            row = jnp.clip(jnp.cumsum(is_patch, axis=1) - 1, 0, image_features.shape[1] - 1)
            features = jnp.take_along_axis(image_features, row[..., None], axis=1)
            x = jnp.where(is_patch[..., None], features.astype(x.dtype), x)
        return constrain(x, "batch", "length", None)

    def init_cache(self, batch_size: int, max_len: int, dtype=None) -> Cache:
        """Returns an empty cache for rows of at most `max_len` tokens."""

        def empty(shape, axes):
            return constrain(jnp.zeros(shape, dtype or self.dtype), *axes)

        return self._make_cache(batch_size, max_len, empty, jnp.zeros(batch_size, jnp.int32))

    def abstract_cache(self, batch_size: int, max_len: int, mesh: Mesh, dtype=None) -> Cache:
        """Returns the shapes of such a cache and their places on a mesh."""

        def abstract(shape, axes, dtype=dtype or self.dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes, shape))

        return self._make_cache(batch_size, max_len, abstract, abstract((batch_size,), (None,), jnp.int32))

    def _make_cache(self, batch_size: int, max_len: int, make: Callable, lengths) -> Cache:
        text, stack = self.config.text_config, self.layers

        def of_layer(layer: int, num_layers: int) -> LayerCache:
            chunk = text.attention_chunk_size if text.uses_rope(layer) else None
            num_slots = max_len if chunk is None else min(chunk, max_len)
            shape = (num_layers, batch_size, num_slots, text.num_key_value_heads, text.head_dim)
            return LayerCache(make(shape, ops.slot_axes(chunk)), make(shape, ops.slot_axes(chunk)))

        cycle = tuple(of_layer(p, stack.num_cycles) for p in range(len(stack.cycle)))
        tail = tuple(of_layer(layer, 1) for layer in range(stack.num_cycles * len(cycle), text.num_hidden_layers))
        return Cache(Layers(cycle, tail), lengths)

    def _arrange_router_bias(self, router_bias):
        if router_bias is None:
            return None
        text = self.config.text_config
        place = {layer: i for i, layer in enumerate(text.moe_layers)}
        per_layer = [router_bias[place[i]] if i in place else None for i in range(text.num_hidden_layers)]
        return self.layers.arrange(per_layer)


def head_logits(x: Float[Array, "B T D"], kernel: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    """Returns float32 logits of what `Llama4.hidden` gave, with `kernel` the weights of `lm_head`."""
    return constrain(einsum("BTD,DV->BTV", x, kernel, jnp.float32), "dense_batch", "length", "vocab")


def default_positions(shape, segment_ids, cached_lengths) -> Int[Array, "B T"]:
    """Counts tokens from the start of their segment, or on from what the cache holds; padding does not count."""
    batch_size, length = shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))
    if cached_lengths is not None:
        valid = jnp.ones(shape, jnp.int32) if segment_ids is None else (segment_ids > 0).astype(jnp.int32)
        return cached_lengths[:, None] + jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    if segment_ids is None:
        return index
    starts = segment_ids != jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
