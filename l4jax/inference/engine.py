"""The four steps of generation as pure, jitted functions: prefill, start, insert, decode.

`prefill` reads one prompt into a cache of one row, in pieces of at most `PIECE` tokens; the last piece is padded to a
power of two, so few compilations serve all lengths. `start` and `insert` put such a row into a batch, with sampling
options of its own, and draw its first token. `decode` draws one more token for each row: one compilation for all
lengths. Weights are passed as arrays and read in place; caches are donated. The split in three is JetStream's.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from l4jax.config import Llama4Config
from l4jax.inference.options import SamplingOptions
from l4jax.inference.sampling import RowOptions, sample
from l4jax.model.cache import Cache
from l4jax.sharding import SERVING, use_rules

PIECE = 2048
"""Tokens; longer prompts are read piece by piece, which bounds the memory of activations."""
MIN_BUCKET = 16
"""Tokens; shorter pieces are padded to this length."""
TILES_AT_ONCE = 16


class Prefilled(NamedTuple):
    """A prompt that was read."""

    logits: Float[Array, "1 V"]
    """Of the token that comes next, float32."""
    cache: Cache
    """Of one row."""
    seen: Bool[np.ndarray, "1 V"]
    """Which tokens the prompt holds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """A batch of answers in the making, one a row."""

    cache: Cache
    tokens: Int[Array, " B"]
    """Drawn last, and not in the cache yet."""
    seen: Bool[Array, "B V"]
    """Which tokens prompt and answer hold."""
    steps: Int[Array, " B"]
    """Tokens drawn so far."""
    options: RowOptions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """The tokens of one step."""

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    """Log-probability of each token in the model's own distribution, before penalty and temperature."""
    top_ids: Int[Array, "B n"]
    """The likeliest tokens, best first; n is 0 if nobody asked."""
    top_logprobs: Float[Array, "B n"]


class Engine:
    """A model with its compiled steps.

    Args:
        model: the model as a Flax module; its arrays are kept, not copied.
        max_len: tokens, prompt and answer together, that a row may hold; the size of the caches.
        mesh: the mesh that the model's arrays live on.
    """

    def __init__(self, model: nnx.Module, *, max_len: int, mesh: jax.sharding.Mesh):
        self.config: Llama4Config = model.config
        self.max_len = max_len
        self.mesh = mesh
        self._graphdef, state = nnx.split(model)
        # Nested dicts of arrays: walking over modules on each call would cost more than the dispatch.
        self.params: dict[str, Any] = nnx.to_pure_dict(state)
        self._encode_tiles = jax.jit(self._encode_tiles_step)
        self._take_features = jax.jit(take_features, static_argnames="count")
        self._empty_cache = jax.jit(self._empty_cache_step, static_argnames="batch_size")
        self._prefill = jax.jit(self._prefill_step, donate_argnames="cache")
        self._start = jax.jit(self._start_step, static_argnames=("batch_size", "num_top"))
        self._insert = jax.jit(self._insert_step, static_argnames="num_top", donate_argnames="state")
        self._decode = jax.jit(self._decode_step, static_argnames="num_top", donate_argnames="state")
        self._forward = jax.jit(self._forward_step)

    # --- What callers use ---------------------------------------------------------------------------------------------

    def prefill(self, ids: Int32[np.ndarray, " T"], tiles: Float32[np.ndarray, "n 3 X X"] | None = None) -> Prefilled:
        """Reads one prompt.

        Raises:
            ValueError: it is empty or too long, holds ids outside the vocabulary, or pictures and patch tokens differ.
        """
        check_prompt(self.config, ids, tiles, self.max_len)
        is_patch = ids == self.config.image_token_index
        with self._devices():
            features = self._features(tiles) if is_patch.any() else None
            cache = self._empty_cache(self.params, batch_size=1)
            for start in range(0, len(ids), PIECE):
                piece = ids[start : start + PIECE]
                bucket = bucket_size(len(piece), MIN_BUCKET)
                rows = None
                if is_patch[start : start + PIECE].any():
                    rows = self._take_features(features, np.int32(is_patch[:start].sum()), count=bucket)
                padded = np.pad(piece, (0, bucket - len(piece)))[None]
                logits, cache = self._prefill(self.params, cache, padded, np.int32(len(piece)), rows)
        seen = np.zeros((1, self.config.text_config.vocab_size), bool)
        seen[0, ids] = True
        return Prefilled(logits, cache, seen)

    def start(
        self, prompt: Prefilled, options: SamplingOptions, *, batch_size: int, num_top: int = 0
    ) -> tuple[DecodeState, Drawn]:
        """Returns a batch whose row 0 answers `prompt`, the others idle, and the first token (of one row).

        A batch of one takes over the cache of `prompt`, which must not be used again.
        """
        rows = RowOptions.of([options])
        with self._devices():
            return self._start(
                self.params, prompt.cache, prompt.logits, prompt.seen, rows, batch_size=batch_size, num_top=num_top
            )

    def insert(
        self, state: DecodeState, prompt: Prefilled, options: SamplingOptions, row: int, *, num_top: int = 0
    ) -> tuple[DecodeState, Drawn]:
        """Returns the batch with an answer to `prompt` begun in `row`, and its first token; `state` is donated."""
        rows = RowOptions.of([options])
        with self._devices():
            return self._insert(state, prompt.cache, prompt.logits, prompt.seen, rows, np.int32(row), num_top=num_top)

    def decode(
        self, state: DecodeState, active: Bool[np.ndarray, " B"], *, num_top: int = 0
    ) -> tuple[DecodeState, Drawn]:
        """Returns the batch one token further; `state` is donated. Rows that are not active stay as they are.

        Args:
            active: which rows go on. An active row must have room: fewer than `max_len` tokens.
            num_top: 0, or `MAX_LOGPROBS` to get the likeliest tokens too, by a compilation of its own.
        """
        with self._devices():
            return self._decode(self.params, state, active, num_top=num_top)

    def logits(
        self, ids: Int32[np.ndarray, "B T"], tiles: Float32[np.ndarray, "n 3 X X"] | None = None
    ) -> Float32[np.ndarray, "B T V"]:
        """Returns the logits of every token, without a cache; rows share one stack of tiles, in order.

        Raises:
            ValueError: as for `prefill`.
        """
        check_prompt(self.config, ids.reshape(-1), tiles, None)
        length = ids.shape[1]
        bucket = bucket_size(length, MIN_BUCKET)
        padded = np.pad(ids, ((0, 0), (0, bucket - length)))
        segment_ids = np.broadcast_to(np.arange(bucket) < length, padded.shape).astype(np.int32)
        with self._devices():
            is_patch = ids == self.config.image_token_index
            features = None
            if is_patch.any():
                index = np.where(is_patch, np.cumsum(is_patch).reshape(ids.shape) - 1, 0)  # in the line of all rows
                # To the front of each row, in order; what follows stands for no token.
                order = np.argsort(~is_patch, axis=1, kind="stable")
                features = self._features(tiles)[0, np.take_along_axis(index, order, axis=1)]
            return np.asarray(self._forward(self.params, padded, segment_ids, features))[:, :length]

    # --- Without a device -------------------------------------------------------------------------------------------

    def lower_prefill(self, piece: int) -> jax.stages.Lowered:
        """Returns the reading of a piece of a prompt, to be compiled; the model may be abstract, its mesh elsewhere."""
        with use_rules(SERVING):
            cache = self._model(self.params).abstract_cache(1, self.max_len, self.mesh)
            return self._prefill.lower(self.params, cache, self._abstract((1, piece)), self._abstract(()), None)

    def lower_decode(self, batch_size: int) -> jax.stages.Lowered:
        """Returns a step of decoding, likewise."""
        rows = self._abstract((batch_size,))
        options = RowOptions(
            **{field.name: self._abstract((batch_size,), np.float32) for field in dataclasses.fields(RowOptions)}
            | {"top_k": rows, "seed": self._abstract((batch_size,), np.uint32)}
        )
        with use_rules(SERVING):
            state = DecodeState(
                cache=self._model(self.params).abstract_cache(batch_size, self.max_len, self.mesh),
                tokens=rows,
                seen=self._abstract((batch_size, self.config.text_config.vocab_size), bool),
                steps=rows,
                options=options,
            )
            return self._decode.lower(self.params, state, self._abstract((batch_size,), bool), num_top=0)

    def _abstract(self, shape: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        place = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    # --- Parts ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _devices(self) -> Iterator[None]:
        """What is traced in here is laid out over the mesh as serving wants it."""
        with jax.set_mesh(self.mesh), use_rules(SERVING):
            yield

    def _features(self, tiles: Float32[np.ndarray, "n 3 X X"]) -> Float[Array, "1 R D"]:
        """Returns the rows that stand for pictures, and beyond them rows of nothing."""
        groups = []
        for start in range(0, len(tiles), TILES_AT_ONCE):
            group = tiles[start : start + TILES_AT_ONCE]
            padding = bucket_size(len(group)) - len(group)
            groups.append(self._encode_tiles(self.params, np.pad(group, ((0, padding), (0, 0), (0, 0), (0, 0)))[None]))
        return groups[0] if len(groups) == 1 else jnp.concatenate(groups, axis=1)

    # --- What is compiled ---------------------------------------------------------------------------------------------

    def _model(self, params) -> nnx.Module:
        return nnx.merge(self._graphdef, params)

    def _encode_tiles_step(self, params, tiles):
        return self._model(params).encode_tiles(tiles)

    def _forward_step(self, params, ids, segment_ids, features):
        return self._model(params)(ids, segment_ids=segment_ids, image_features=features)[0]

    def _empty_cache_step(self, params, batch_size: int) -> Cache:
        return self._model(params).init_cache(batch_size, self.max_len)

    def _prefill_step(self, params, cache, ids, length, features):
        """One piece [1, T], of which the first `length` tokens count."""
        segment_ids = (jnp.arange(ids.shape[1]) < length).astype(jnp.int32)[None]
        logits, cache = self._model(params)(
            ids, segment_ids=segment_ids, image_features=features, cache=cache, logits_at=length[None] - 1
        )
        return logits[:, 0], cache

    def _start_step(self, params, row_cache, logits, seen, options, batch_size: int, num_top: int):
        # jit hands on an argument that it returns unchanged: a batch of one needs no second cache.
        cache = row_cache
        if batch_size > 1:
            cache = put_row(self._empty_cache_step(params, batch_size), row_cache, 0)
        state = DecodeState(
            cache=cache,
            tokens=jnp.zeros(batch_size, jnp.int32),
            seen=jnp.zeros((batch_size, seen.shape[1]), bool),
            steps=jnp.zeros(batch_size, jnp.int32),
            options=jax.tree.map(lambda x: jnp.broadcast_to(x, (batch_size,)), options),
        )
        return draw_first(state, logits, seen, options, 0, num_top)

    def _insert_step(self, state, row_cache, logits, seen, options, row, num_top: int):
        state = replace(state, cache=put_row(state.cache, row_cache, row))
        return draw_first(state, logits, seen, options, row, num_top)

    def _decode_step(self, params, state, active, num_top: int):
        logits, cache = self._model(params)(
            state.tokens[:, None], segment_ids=active[:, None].astype(jnp.int32), cache=state.cache
        )
        logits = logits[:, 0]
        drawn = draw(logits, state.seen, state.options, state.steps, num_top)
        rows, newly_seen = jnp.arange(len(active)), jnp.where(active, drawn.tokens, logits.shape[1])
        state = DecodeState(
            cache=cache,
            tokens=jnp.where(active, drawn.tokens, state.tokens),
            seen=state.seen.at[rows, newly_seen].set(True, mode="drop"),
            steps=state.steps + active,
            options=state.options,
        )
        return state, drawn


# --- Parts of the steps -----------------------------------------------------------------------------------------------


def draw(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], options: RowOptions, steps, num_top: int) -> Drawn:
    """Returns the next token of each row with its log-probability, and the `num_top` likeliest."""
    tokens = sample(logits, seen, options, steps)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = jax.lax.top_k(logits, num_top)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1) - total
    return Drawn(tokens, logprobs[:, 0], top_ids, top - total)


def draw_first(state: DecodeState, logits, seen, options: RowOptions, row, num_top: int) -> tuple[DecodeState, Drawn]:
    """Returns the state with the first token of an answer, and its options, in `row`; and that token."""
    drawn = draw(logits, seen, options, jnp.zeros(1, jnp.int32), num_top)
    seen = seen.at[0, drawn.tokens[0]].set(True)
    state = replace(
        state,
        tokens=state.tokens.at[row].set(drawn.tokens[0]),
        seen=state.seen.at[row].set(seen[0]),
        steps=state.steps.at[row].set(1),
        options=jax.tree.map(lambda all_rows, new: all_rows.at[row].set(new[0]), state.options, options),
    )
    return state, drawn


def put_row(cache: Cache, row_cache: Cache, row) -> Cache:
    """Returns `cache` with its row `row` replaced by a cache of one row."""
    layers = jax.tree.map(
        lambda all_rows, new: jax.lax.dynamic_update_slice_in_dim(all_rows, new, row, axis=1),
        cache.layers,
        row_cache.layers,
    )
    return Cache(layers, cache.lengths.at[row].set(row_cache.lengths[0]))


def take_features(features: Float[Array, "1 R D"], start: Int[Array, ""], count: int) -> Float[Array, "1 T D"]:
    """Returns `count` rows from `start` on; past the end the last one, which nobody reads."""
    return jnp.take(features, start + jnp.arange(count), axis=1, mode="clip")


def bucket_size(count: int, smallest: int = 1) -> int:
    """Returns the power of two that is at least `count`, and at least `smallest`."""
    return max(smallest, 1 << (count - 1).bit_length())


def check_prompt(config: Llama4Config, ids: np.ndarray, tiles: np.ndarray | None, max_len: int | None) -> None:
    """Checks ids, pictures and length before anything is compiled.

    Raises:
        ValueError: they do not fit one another or the model; the message has the numbers.
    """
    text, num_tiles = config.text_config, 0 if tiles is None else len(tiles)
    if not ids.size:
        raise ValueError("the prompt has no tokens; give some text")
    if ids.min() < 0 or ids.max() >= text.vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"token id {worst} is outside of 0..{text.vocab_size - 1}, the model's vocabulary")
    num_patches = int((ids == config.image_token_index).sum()) if config.vision_config else 0
    per_tile = config.vision_config.tokens_per_tile if config.vision_config else 0
    if num_tiles and config.vision_config is None:
        raise ValueError(f"{num_tiles} tiles for a model without a vision tower; leave the pictures out")
    if num_patches != num_tiles * per_tile:
        raise ValueError(
            f"{num_tiles} tiles x {per_tile} tokens per tile = {num_tiles * per_tile:,} picture tokens, but the prompt "
            f"has {num_patches:,}; give every picture its tiles and its tokens"
        )
    if max_len is not None and len(ids) >= max_len:
        pictures = f" ({num_tiles} tiles x {per_tile} = {num_patches:,} for pictures)" if num_tiles else ""
        limit = text.max_position_embeddings
        mend = (
            f"shorten it or load the model with a larger max_len (--max-len), up to {limit:,}"
            if max_len < limit
            else "shorten it, the model takes no more"
        )
        raise ValueError(f"the prompt is {len(ids):,} tokens{pictures}, its limit is {max_len:,}; {mend}")
