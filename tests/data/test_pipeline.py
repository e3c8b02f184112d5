import grain
import numpy as np
import pytest

from l4jax.data.pipeline import batches, encode_example
from l4jax.processing.chat import Processor
from l4jax.processing.tokenizer import ByteTokenizer


def examples(count: int) -> grain.MapDataset:
    """Examples of 5 to 20 tokens and 0 to 3 tiles; every token and tile carries the number of its example."""

    def make(index: int, rng: np.random.Generator):
        length, tiles = rng.integers(5, 21), rng.integers(0, 4)
        ids = np.full(length, index + 1, np.int32)
        return {"ids": ids, "loss_mask": ids % 2 == 0, "tiles": np.full((tiles, 3, 2, 2), index + 1, np.float32)}

    return grain.MapDataset.range(count).seed(0).shuffle().repeat().random_map(make)


def make_batches(count: int = 50):
    return batches(examples(count), rows=3, row_tokens=40, row_tiles=6)


def test_rows_hold_whole_examples_with_their_positions():
    for batch, _ in zip(make_batches(), range(10), strict=False):
        for ids, positions, segments in zip(batch["ids"], batch["positions"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                mine = segments == segment
                assert len(set(ids[mine])) == 1
                np.testing.assert_array_equal(positions[mine], np.arange(mine.sum()))


def test_tiles_stand_beside_their_row_in_the_order_of_its_examples_and_padding_comes_last():
    for batch, _ in zip(make_batches(), range(10), strict=False):
        assert batch["tiles"].shape == (3, 6, 3, 2, 2)
        for ids, tiles in zip(batch["ids"], batch["tiles"][:, :, 0, 0, 0], strict=True):
            used = np.count_nonzero(tiles)
            assert not tiles[used:].any()
            in_order = [n for n in dict.fromkeys(ids.tolist()) if n]
            assert list(dict.fromkeys(tiles[:used].astype(int).tolist())) == [n for n in in_order if n in tiles]


def test_iterator_goes_on_where_its_state_was_saved():
    iterator = iter(make_batches())
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(5)]

    other = iter(make_batches())
    other.set_state(state)
    for batch in expected:
        for name, array in next(other).items():
            np.testing.assert_array_equal(array, batch[name])


def test_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="Exceeds"):
        next(iter(batches(examples(50), rows=3, row_tokens=10, row_tiles=6)))


def test_loss_counts_on_the_answer_and_its_end():
    tokenizer = ByteTokenizer()
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    example = encode_example(Processor(tokenizer), messages)
    learned = example["ids"][example["loss_mask"]]
    assert learned.tolist() == [ord("4"), tokenizer.eot_id]
    assert example["loss_mask"].sum() == 2
