import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.inference import sampling
from l4jax.inference.options import SamplingOptions
from l4jax.inference.sampling import RowOptions


@pytest.fixture
def logits():
    return np.random.default_rng(0).standard_normal((3, 97)).astype(np.float32) * 4


def column(value, rows=3, dtype=np.float32):
    return jnp.full(rows, value, dtype)


def hf(processor, logits, ids=None):
    import torch

    ids = torch.zeros((len(logits), 0), dtype=torch.long) if ids is None else torch.from_numpy(ids)
    return processor(ids, torch.from_numpy(logits.copy())).numpy()


def test_likeliest_is_argmax_and_the_first_of_equals(logits):
    logits[1, [5, 40]] = 99.0
    np.testing.assert_array_equal(sampling.likeliest(logits), logits.argmax(-1))
    assert sampling.likeliest(jnp.full((1, 97), jnp.nan)) == 96


@pytest.mark.oracle
@pytest.mark.parametrize("top_k", [1, 2, 10, 96, 97, 500])
def test_top_k_equals_hf(logits, top_k):
    from transformers.generation.logits_process import TopKLogitsWarper

    ours = sampling.keep_top_k(logits, column(top_k, dtype=np.int32))
    np.testing.assert_array_equal(ours, hf(TopKLogitsWarper(top_k), logits))


@pytest.mark.oracle
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_hf(logits, top_p):
    from transformers.generation.logits_process import TopPLogitsWarper

    np.testing.assert_array_equal(sampling.keep_top_p(logits, column(top_p)), hf(TopPLogitsWarper(top_p), logits))


@pytest.mark.oracle
@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
def test_min_p_equals_hf(logits, min_p):
    from transformers.generation.logits_process import MinPLogitsWarper

    np.testing.assert_array_equal(sampling.keep_min_p(logits, column(min_p)), hf(MinPLogitsWarper(min_p), logits))


@pytest.mark.oracle
@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty_equals_hf(logits, penalty):
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = np.random.default_rng(1).integers(0, 97, (3, 40))
    seen = np.zeros((3, 97), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    ours = sampling.apply_repetition_penalty(logits, seen, column(penalty))
    np.testing.assert_allclose(ours, hf(RepetitionPenaltyLogitsProcessor(penalty), logits, ids), rtol=1e-6)


def test_options_that_are_off_change_nothing(logits):
    for filtered in (
        sampling.keep_top_k(logits, column(0, dtype=np.int32)),
        sampling.keep_top_p(logits, column(1.0)),
        sampling.keep_min_p(logits, column(0.0)),
    ):
        np.testing.assert_array_equal(filtered, logits)


def test_infinite_zero_and_negative_logits_are_ordered():
    logits = np.array([[-np.inf, -0.5, 0.0, 3.0, -2.0]], np.float32)
    kept = np.isfinite(sampling.keep_top_k(logits, column(2, 1, np.int32)))
    np.testing.assert_array_equal(kept[0], [False, False, True, True, False])


def draw(logits, rows, steps=None, seen=None):
    steps = np.zeros(len(rows), np.int32) if steps is None else steps
    seen = np.zeros(logits.shape, bool) if seen is None else seen
    return np.asarray(sampling.sample(jnp.asarray(logits), jnp.asarray(seen), RowOptions.of(rows), jnp.asarray(steps)))


def test_a_row_draws_the_same_token_in_every_batch(logits):
    rows = [SamplingOptions(temperature=1.0, top_p=1.0, seed=seed) for seed in (3, 4, 5)]
    together = draw(logits, rows, np.array([7, 8, 9], np.int32))
    alone = [draw(logits[i : i + 1], rows[i : i + 1], np.array([7 + i], np.int32))[0] for i in range(3)]
    np.testing.assert_array_equal(together, alone)


def test_temperature_zero_is_greedy_beside_rows_that_draw(logits):
    rows = [SamplingOptions(temperature=0, seed=1), *[SamplingOptions(temperature=5.0, seed=2)] * 2]
    assert draw(logits, rows)[0] == logits[0].argmax()


def test_greedy_obeys_the_repetition_penalty():
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    seen = np.array([[True, False, False]])
    assert draw(logits, [SamplingOptions(temperature=0, repetition_penalty=1.5, seed=0)], seen=seen)[0] == 1


def test_draws_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    count = 4000
    options = SamplingOptions(temperature=1.0, top_p=1.0, seed=0)
    tokens = draw(np.tile(logits, (count, 1)), [options] * count, np.arange(count, dtype=np.int32))
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / count, np.exp(logits), atol=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"logprobs": 21},
        {"stop_strings": [""]},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingOptions.create(**options)


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        SamplingOptions.create(temprature=1)


def test_one_stop_string_may_come_without_a_list():
    assert SamplingOptions(stop_strings="end", eos_token_id=7) == SamplingOptions(
        stop_strings=["end"], eos_token_id=[7]
    )


def test_seeds_are_drawn_once():
    options = SamplingOptions().with_seed()
    assert options.seed is not None
    assert options.with_seed() is options
    assert dataclasses.replace(options, seed=None).with_seed().seed != options.seed
