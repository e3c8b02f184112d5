"""Prefill in pieces, decoding, padding, packing: every way through the model gives the logits of one forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l4jax.model.llama4 import Llama4
from l4jax.ops.cached import held_positions
from tests.oracle import small_config

CHUNK, LENGTH, PIECE = 8, 42, 24
TOLERANCE = 1e-5


class Runner:
    """A small model with its three compiled ways of running: all at once, a padded piece, one token."""

    def __init__(self, name: str, **fields):
        fields = {"num_hidden_layers": 2, "moe_layers": (0,), "no_rope_layers": (1, 0)} | fields
        self.config = small_config(name, **fields)
        self.model = Llama4(self.config, rngs=nnx.Rngs(3))
        self.full = jax.jit(lambda ids, segments: self.model(ids, segment_ids=segments)[0])
        self.continued = jax.jit(lambda ids, segments, cache: self.model(ids, segment_ids=segments, cache=cache))
        self.ids = np.random.default_rng(0).integers(0, 256, (2, LENGTH)).astype(np.int32)
        self.expected = np.asarray(self.full(self.ids, None))

    def piece(self, ids, cache, left: bool = False):
        """Prefills `ids`, padded to PIECE tokens; returns the logits of the real ones."""
        pad = PIECE - ids.shape[1]
        widths = ((0, 0), (pad, 0) if left else (0, pad))
        segments = np.pad(np.ones_like(ids), widths)
        logits, cache = self.continued(np.pad(ids, widths), segments, cache)
        return np.asarray(logits)[:, pad:] if left else np.asarray(logits)[:, : ids.shape[1]], cache

    def decode(self, ids, cache):
        logits = []
        for t in range(ids.shape[1]):
            step, cache = self.continued(ids[:, t : t + 1], None, cache)
            logits.append(np.asarray(step))
        return np.concatenate(logits, axis=1) if logits else np.zeros((2, 0, 1)), cache


@pytest.fixture(scope="module", params=["small-scout", "small-maverick"])
def runner(request):
    return Runner(request.param)


def splits():
    near = (7, 8, 9, 15, 16, 17)
    yield from ((s,) for s in (1, *near, 23, 24))
    yield from ((a, b) for a in near for b in near if a < b)
    yield from [(8, 9, 17), (7, 16, 23), (8, 16, 24)]


@pytest.mark.parametrize("split", list(splits()), ids=str)
def test_prefill_in_pieces_then_decoding_equals_one_forward(runner, split):
    """Decoding goes on from the last piece across two more chunk edges."""
    cache, start, logits = runner.model.init_cache(2, LENGTH), 0, []
    for end in split:
        out, cache = runner.piece(runner.ids[:, start:end], cache)
        logits.append(out)
        start = end
    end = min(start + 18, LENGTH)
    out, cache = runner.decode(runner.ids[:, start:end], cache)
    actual = np.concatenate([*logits, out], axis=1)
    np.testing.assert_allclose(actual, runner.expected[:, :end], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(cache.lengths, [end, end])


def test_unpadded_prefill_longer_than_several_chunks(runner):
    logits, cache = runner.continued(runner.ids[:, :30], None, runner.model.init_cache(2, LENGTH))
    np.testing.assert_allclose(logits, runner.expected[:, :30], rtol=0, atol=TOLERANCE)
    logits, _ = runner.decode(runner.ids[:, 30:], cache)
    np.testing.assert_allclose(logits, runner.expected[:, 30:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_rows_of_unequal_length_equal_each_row_alone(runner, left):
    lengths = (9, 21)
    ids, segments = np.zeros((2, PIECE), np.int32), np.zeros((2, PIECE), np.int32)
    for row, length in enumerate(lengths):
        here = slice(PIECE - length, None) if left else slice(0, length)
        ids[row, here], segments[row, here] = runner.ids[row, :length], 1
    logits, cache = runner.continued(ids, segments, runner.model.init_cache(2, LENGTH))
    uncached = runner.full(ids, segments)
    for row, length in enumerate(lengths):
        expected = runner.expected[row, :length]
        np.testing.assert_allclose(np.asarray(logits)[row][segments[row] > 0], expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(np.asarray(uncached)[row][segments[row] > 0], expected, rtol=0, atol=TOLERANCE)
    # Each row goes on from its own length, over two chunk edges.
    steps = np.stack([runner.ids[row, length : length + 18] for row, length in enumerate(lengths)])
    logits, _ = runner.decode(steps, cache)
    for row, length in enumerate(lengths):
        expected = runner.expected[row, length : length + 18]
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=TOLERANCE)


def test_a_row_without_new_tokens_keeps_its_cache(runner):
    _, cache = runner.piece(runner.ids[:, :13], runner.model.init_cache(2, LENGTH))
    idle = np.array([[1], [0]], np.int32)
    for t in (13, 14):
        _, cache = runner.continued(runner.ids[:, t : t + 1], idle, cache)
    np.testing.assert_array_equal(cache.lengths, [15, 13])
    rest = np.stack([runner.ids[0, 15:20], runner.ids[1, 13:18]])
    logits, _ = runner.decode(rest, cache)
    np.testing.assert_allclose(logits[0], runner.expected[0, 15:20], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits[1], runner.expected[1, 13:18], rtol=0, atol=TOLERANCE)


def test_packed_documents_equal_each_alone(runner):
    """Positions, chunks and the temperature count from the start of each document."""
    first, second = runner.ids[0, :11], runner.ids[1, :27]
    row = np.concatenate([first, second, np.zeros(4, np.int32)])[None]
    segments = np.array([[1] * 11 + [2] * 27 + [0] * 4])
    logits = np.asarray(runner.full(np.repeat(row, 2, 0), np.repeat(segments, 2, 0)))[0]
    np.testing.assert_allclose(logits[:11], runner.expected[0, :11], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits[11:38], runner.expected[1, :27], rtol=0, atol=TOLERANCE)


def test_chunked_layers_keep_one_chunk(runner):
    tail = runner.model.init_cache(2, LENGTH).layers.tail
    assert [layer.k.shape[2] for layer in tail] == [CHUNK, LENGTH]
    assert [layer.k.shape[2] for layer in runner.model.init_cache(2, 5).layers.tail] == [5, 5]


def test_scanned_layers_decode_like_unrolled_ones():
    fields = {"num_hidden_layers": 6, "moe_layers": tuple(range(6)), "no_rope_layers": (1, 0, 1, 0, 1, 0)}
    config = small_config("small-scout", **fields)
    model = Llama4(config, rngs=nnx.Rngs(0), scan_layers=True)
    ids = np.random.default_rng(1).integers(0, 256, (1, 20)).astype(np.int32)
    step = jax.jit(lambda ids, cache: model(ids, cache=cache))
    expected = jax.jit(lambda ids: model(ids)[0])(ids)
    logits, cache = step(ids[:, :9], model.init_cache(1, 20))
    parts = [logits]
    for t in range(9, 20):
        logits, cache = step(ids[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, rtol=0, atol=TOLERANCE)


def test_cached_positions_of_a_chunked_layer_forget_the_last_chunk():
    positions, visible = held_positions(jnp.array([0, 5, 8, 19]), 0, 8, 8)
    np.testing.assert_array_equal(visible.sum(axis=1), [0, 5, 0, 3])
    np.testing.assert_array_equal(positions[3, :3], [16, 17, 18])


def test_tokens_of_an_earlier_chunk_are_out_of_sight():
    """With rotary layers only, what stands before the chunk edge cannot change anything behind it."""
    config = small_config("small-scout", num_hidden_layers=2, moe_layers=(0, 1), no_rope_layers=(1, 1))
    model = Llama4(config, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 256, (2, 20)).astype(np.int32)
    ids[1, 16:] = ids[0, 16:]
    logits = np.asarray(jax.jit(lambda ids: model(ids)[0])(ids))
    np.testing.assert_allclose(logits[0, 16:], logits[1, 16:], rtol=0, atol=TOLERANCE)
    assert np.abs(logits[0, :16] - logits[1, :16]).max() > 0.1
