import numpy as np
import pytest

from l4jax.inference.generate import Prompt, TextStream, collect, stream
from l4jax.inference.options import SamplingOptions
from l4jax.processing.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(512)
DRAWN = {"temperature": 1.5, "top_p": 1.0, "eos_token_id": ()}


def prompt(length, seed=0):
    return Prompt(np.random.default_rng(seed).integers(0, 256, length).astype(np.int32))


def generate(engine, prompts, options, tokenizer=TOKENIZER):
    options = options if isinstance(options, list) else [options] * len(prompts)
    return collect(stream(engine, prompts, options, tokenizer=tokenizer, eos_token_id=(257, 258)), prompts)


def one(engine, length, **options):
    return generate(engine, [prompt(length)], SamplingOptions(**options))[0]


def test_rows_of_unequal_length_equal_the_rows_alone(engine):
    lengths, options = (3, 20, 9), [SamplingOptions(seed=seed, max_new_tokens=4 + seed, **DRAWN) for seed in range(3)]
    together = generate(engine, [prompt(length) for length in lengths], options)
    for row, (length, own) in enumerate(zip(lengths, options, strict=True)):
        alone = generate(engine, [prompt(length)], own)[0]
        assert (alone.ids, alone.text) == (together[row].ids, together[row].text)
        np.testing.assert_allclose(alone.logprobs, together[row].logprobs, atol=1e-5)


def test_a_seed_gives_the_same_answer_and_another_seed_another(engine):
    first, again, other = (one(engine, 5, seed=seed, max_new_tokens=12, **DRAWN).ids for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_seed_answers_differ(engine):
    assert one(engine, 5, max_new_tokens=12, **DRAWN).ids != one(engine, 5, max_new_tokens=12, **DRAWN).ids


def test_an_answer_ends_at_an_end_token(engine):
    ids = one(engine, 5, seed=1, max_new_tokens=12, **DRAWN).ids
    ended = one(engine, 5, seed=1, max_new_tokens=12, **DRAWN | {"eos_token_id": (ids[6],)})
    stop = ids.index(ids[6])
    assert (ended.ids, ended.finish_reason) == (ids[: stop + 1], "stop")


def test_an_answer_ends_where_the_cache_does(engine):
    answer = one(engine, engine.max_len - 4, temperature=0, eos_token_id=(), max_new_tokens=100)
    assert (answer.completion_tokens, answer.finish_reason, answer.prompt_tokens) == (4, "length", engine.max_len - 4)


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine):
    whole = one(engine, 5, seed=1, max_new_tokens=24, **DRAWN)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    cut = one(engine, 5, seed=1, max_new_tokens=24, stop_strings=[stop], **DRAWN)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]


def test_pieces_of_a_stream_join_to_the_text(engine):
    options = SamplingOptions(seed=3, max_new_tokens=20, stop_strings=["\x00zz"], **DRAWN)
    events = list(stream(engine, [prompt(7)], [options], tokenizer=TOKENIZER, eos_token_id=()))
    answer = generate(engine, [prompt(7)], options)[0]
    assert "".join(event.text for event in events) == answer.text == TOKENIZER.decode(answer.ids, skip_special=True)
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]


def test_the_likeliest_tokens_are_reported_on_request(engine):
    answer = one(engine, 5, temperature=0, logprobs=3, max_new_tokens=4, eos_token_id=())
    for token, logprob, top in zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=True):
        assert len(top) == 3
        assert (top[0][0], pytest.approx(top[0][1])) == (token, logprob)


def test_without_a_tokenizer_there_are_ids_but_no_stop_strings(engine):
    answer = generate(engine, [prompt(5)], SamplingOptions(temperature=0, max_new_tokens=3), tokenizer=None)[0]
    assert (len(answer.ids), answer.text) == (3, "")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generate(engine, [prompt(5)], SamplingOptions(stop_strings=["x"]), tokenizer=None)


def pushed(text, stop_strings=()):
    """The pieces that come out as the bytes of `text` go in one by one, the rest last."""
    words = TextStream(TOKENIZER, stop_strings)
    return [*(words.push(byte) for byte in text.encode()), words.finish()]


def test_half_characters_are_held_back():
    assert pushed("aé€🦙") == ["a", "", "é", "", "", "€", "", "", "", "🦙", ""]


def test_what_may_begin_a_stop_string_is_held_back():
    assert pushed("a<b<en>", ["<end>"]) == ["a", "", "<b", "", "", "", "<en>", ""]
    assert pushed("a<en", ["<end>"]) == ["a", "", "", "", "<en"]


def test_nothing_follows_a_stop_string():
    assert "".join(pushed("one two three", ["two", "three"])) == "one "
    assert "".join(pushed("aab", ["ab"])) == "a"
    assert "".join(pushed("xyz", ["yz", "y"])) == "x"


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["small-scout", "small-maverick"])
def test_greedy_answers_equal_those_of_transformers(tmp_path, name):
    """Across three chunk edges and twice as many steps of the temperature."""
    import torch

    from l4jax.config import layer_pattern
    from l4jax.inference.engine import Engine
    from l4jax.sharding import make_mesh
    from tests import oracle

    step = 1 if name == "small-scout" else 2
    config = oracle.small_config(name, num_hidden_layers=4, **layer_pattern(4, moe_step=step, nope_interval=2))
    hf = oracle.hf_model(config)
    ours = Engine(oracle.load_l4jax(oracle.save_hf(hf, tmp_path), config), max_len=64, mesh=make_mesh())
    for length, penalty in ((5, 1.0), (16, 1.4)):
        ids = prompt(length).ids
        options = {"max_new_tokens": 24, "repetition_penalty": penalty}
        expected = hf.generate(torch.tensor(ids[None]), do_sample=False, eos_token_id=None, pad_token_id=0, **options)
        answer = generate(ours, [Prompt(ids)], SamplingOptions(temperature=0, eos_token_id=(), **options))[0]
        assert answer.ids == expected[0, length:].tolist()


@pytest.mark.oracle
def test_greedy_answers_to_pictures_equal_those_of_transformers(tmp_path):
    import torch

    from l4jax.config import layer_pattern
    from l4jax.inference.engine import Engine
    from l4jax.sharding import make_mesh
    from tests import oracle

    config = oracle.small_config("small-scout", num_hidden_layers=2, **layer_pattern(2, nope_interval=2))
    hf = oracle.hf_model(config)
    ours = Engine(oracle.load_l4jax(oracle.save_hf(hf, tmp_path), config), max_len=64, mesh=make_mesh())
    rng = np.random.default_rng(0)
    side, per_tile = config.vision_config.image_size, config.vision_config.tokens_per_tile
    tiles = rng.uniform(-1, 1, (3, 3, side, side)).astype(np.float32)
    ids = np.concatenate([rng.integers(0, 256, 6), [config.image_token_index] * per_tile * 3, rng.integers(0, 256, 4)])
    inputs = {"input_ids": torch.tensor(ids[None]), "pixel_values": torch.tensor(tiles)}
    expected = hf.generate(**inputs, do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=16)
    options = SamplingOptions(temperature=0, eos_token_id=(), max_new_tokens=16)
    assert generate(ours, [Prompt(ids.astype(np.int32), tiles)], options)[0].ids == expected[0, len(ids) :].tolist()
