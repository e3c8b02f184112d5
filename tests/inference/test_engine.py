import jax
import numpy as np
import pytest

from l4jax.inference import engine as engine_module
from l4jax.inference.engine import bucket_size
from l4jax.inference.options import MAX_LOGPROBS, SamplingOptions
from l4jax.sharding import make_mesh

GREEDY = SamplingOptions(temperature=0, seed=0)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def with_tiles(config, count, seed=0):
    """A prompt whose patch tokens begin in one piece of 16 and end in another, and its tiles."""
    per_tile, side = config.vision_config.tokens_per_tile, config.vision_config.image_size
    tiles = np.random.default_rng(seed).uniform(-1, 1, (count, 3, side, side)).astype(np.float32)
    ids = np.concatenate([text(12), np.full(per_tile * count, config.image_token_index, np.int32), text(5, 1)])
    return ids.astype(np.int32), tiles


def greedy(engine, ids, steps, tiles=None):
    """Draws `steps` tokens by the engine, one row."""
    state, drawn = engine.start(engine.prefill(ids, tiles), GREEDY, batch_size=1)
    tokens = [int(drawn.tokens[0])]
    for _ in range(steps - 1):
        state, drawn = engine.decode(state, np.ones(1, bool))
        tokens.append(int(drawn.tokens[0]))
    return tokens


def full_forward(engine, ids, steps, tiles=None):
    """Draws greedily by a whole forward pass for each token."""
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(engine.logits(np.array([ids], np.int32), tiles)[0, -1].argmax()))
    return ids[-steps:]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_decoding_equals_full_forwards_across_chunk_edges(engine, length):
    assert greedy(engine, text(length), 20) == full_forward(engine, text(length), 20)


def test_pictures_decode_like_full_forwards(engine):
    ids, tiles = with_tiles(engine.config, 3)
    assert greedy(engine, ids, 6, tiles) == full_forward(engine, ids, 6, tiles)


@pytest.mark.parametrize("piece", [16, 32])
def test_prefill_in_pieces_equals_prefill_at_once(engine, monkeypatch, piece):
    ids, tiles = with_tiles(engine.config, 4)
    at_once = engine.prefill(ids, tiles)
    monkeypatch.setattr(engine_module, "PIECE", piece)
    in_pieces = engine.prefill(ids, tiles)
    np.testing.assert_allclose(in_pieces.logits, at_once.logits, atol=1e-5)
    assert int(in_pieces.cache.lengths[0]) == len(ids)


def test_more_tiles_than_are_encoded_at_once(engine, monkeypatch):
    ids, tiles = with_tiles(engine.config, 5)
    at_once = engine.prefill(ids, tiles)
    monkeypatch.setattr(engine_module, "TILES_AT_ONCE", 2)
    np.testing.assert_allclose(engine.prefill(ids, tiles).logits, at_once.logits, atol=1e-5)


def test_rows_of_a_batch_equal_the_rows_alone(engine):
    lengths, steps = (3, 17, 9), 12
    prompts = [text(length, seed=length) for length in lengths]
    state, drawn = engine.start(engine.prefill(prompts[0]), GREEDY, batch_size=3)
    tokens = [[int(drawn.tokens[0])]]
    for row in (1, 2):
        state, drawn = engine.insert(state, engine.prefill(prompts[row]), GREEDY, row)
        tokens.append([int(drawn.tokens[0])])
    for step in range(1, steps):
        active = np.array([True, step < 4, True])  # the second row is done early
        state, drawn = engine.decode(state, active)
        for row in np.flatnonzero(active):
            tokens[row].append(int(drawn.tokens[row]))
    assert tokens == [
        greedy(engine, prompts[0], steps),
        greedy(engine, prompts[1], 4),
        greedy(engine, prompts[2], steps),
    ]
    np.testing.assert_array_equal(state.cache.lengths, [3 + 11, 17 + 3, 9 + 11])


def test_a_row_that_finished_is_used_again(engine):
    first, second = text(11, 1), text(5, 2)
    state, _ = engine.start(engine.prefill(first), GREEDY, batch_size=2)
    for _ in range(6):
        state, _ = engine.decode(state, np.array([True, False]))
    state, drawn = engine.insert(state, engine.prefill(second), GREEDY, 0)
    tokens = [int(drawn.tokens[0])]
    for _ in range(5):
        state, drawn = engine.decode(state, np.array([True, False]))
        tokens.append(int(drawn.tokens[0]))
    assert tokens == greedy(engine, second, 6)


def test_decode_compiles_once_for_every_length_and_option(small_model):
    engine = engine_module.Engine(small_model, max_len=64, mesh=make_mesh())
    for length, options in (
        (2, GREEDY),
        (31, SamplingOptions(top_k=3, seed=9)),
        (12, SamplingOptions(min_p=0.1, seed=1)),
    ):
        state, _ = engine.start(engine.prefill(text(length)), options, batch_size=1)
        for _ in range(3):
            state, _ = engine.decode(state, np.ones(1, bool))
    assert engine._decode._cache_size() == 1
    assert engine._prefill._cache_size() == 2  # buckets of 16 and 32


def test_the_likeliest_tokens_come_with_log_probabilities(engine):
    ids = text(6)
    _, drawn = engine.start(engine.prefill(ids), GREEDY, batch_size=1, num_top=MAX_LOGPROBS)
    expected = jax.nn.log_softmax(engine.logits(ids[None])[0, -1])
    np.testing.assert_allclose(drawn.top_logprobs[0], np.sort(expected)[::-1][:MAX_LOGPROBS], atol=1e-5)
    np.testing.assert_array_equal(drawn.top_ids[0], np.argsort(-expected, stable=True)[:MAX_LOGPROBS])
    np.testing.assert_allclose(drawn.logprobs[0], expected[int(drawn.tokens[0])], atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_bucket_size(count, size):
    assert bucket_size(count) == size


def bad_prompts(config):
    ids, tiles = with_tiles(config, 2)
    return {
        "has no tokens": (text(0), None),
        "token id 512 is outside": (np.array([512], np.int32), None),
        "token id -1 is outside": (np.array([-1], np.int32), None),
        r"1 tiles x 4 tokens per tile = 4 picture tokens, but the prompt has 8": (ids, tiles[:1]),
        r"0 tiles x 4 tokens per tile = 0 picture tokens, but the prompt has 8": (ids, None),
        r"the prompt is 64 tokens, its limit is 64": (text(64), None),
        r"the prompt is 73 tokens \(2 tiles x 4 = 8 for pictures\), .*--max-len\), up to 4,096": (
            np.concatenate([text(48), ids]),
            tiles,
        ),
    }


def test_bad_prompts_are_refused_with_the_numbers(engine):
    for message, (ids, tiles) in bad_prompts(engine.config).items():
        with pytest.raises(ValueError, match=message):
            engine.prefill(ids, tiles)
