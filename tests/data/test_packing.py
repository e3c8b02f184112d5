import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.data.encode import Example
from l4jax.data.packing import Packed, Packer, Row, make_batch

SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 4)), max_size=60)


def example(tokens, tiles=0, number=1):
    ids = np.full(tokens, number, np.int32)
    return Example(ids, ids % 2 == 0, np.full((tiles, 3, 2, 2), number % 256, np.uint8))


def pack(sizes, row_tokens=20, row_tiles=4, open_rows=3):
    """Returns closed rows as lists of the numbers of their documents."""
    packer, closed = Packer(row_tokens, row_tiles, open_rows), []
    for number, (tokens, tiles) in enumerate(sizes):
        row = packer.add(Packed(("source", number, 0), 1, example(tokens, tiles, number)))
        closed += [row] if row else []
        assert len(packer.rows) <= open_rows
    return [*closed, *packer.close_all()]


@given(SIZES)
@settings(max_examples=100, deadline=None)
def test_every_document_is_in_one_row_that_holds_it(sizes):
    rows = pack(sizes)
    places = [packed.place[1] for row in rows for packed in row.documents]
    assert sorted(places) == list(range(len(sizes)))
    for row in rows:
        tokens, tiles = np.sum([sizes[packed.place[1]] for packed in row.documents], axis=0)
        assert (row.free_tokens, row.free_tiles) == (20 - tokens, 4 - tiles)
        assert min(row.free_tokens, row.free_tiles) >= 0
        numbers = [packed.place[1] for packed in row.documents]
        assert numbers == sorted(numbers)


def test_a_document_goes_where_it_fits_best_and_the_fullest_row_makes_room():
    rows = pack([(12, 0), (15, 0), (5, 0), (18, 0), (11, 0)])
    assert [[packed.place[1] for packed in row.documents] for row in rows] == [[1, 2], [3], [0], [4]]


def documents(kind, rng, count=4000):
    """Sizes of documents: (tokens, tiles), for rows of 8,192 tokens and 48 tiles."""
    if kind == "text":
        tokens, tiles = rng.lognormal(np.log(1200), 1.2, count), np.zeros(count, int)
    elif kind == "any length":
        tokens, tiles = rng.uniform(1, 8192, count), np.zeros(count, int)
    else:  # pictures of up to 17 tiles among text
        tiles = rng.choice([0, 1, 3, 5, 7, 10, 17], count, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
        tokens = rng.lognormal(np.log(200), 1, count) + 145 * tiles
    return np.clip(tokens, 4, 8192).astype(int).tolist(), tiles.tolist()


@pytest.mark.parametrize("kind", ["text", "any length", "pictures"])
def test_rows_are_nine_tenths_full_and_fuller_than_those_of_first_fit(kind):
    rng = np.random.default_rng(0)
    sizes = list(zip(*documents(kind, rng), strict=True))
    packer, used, rows = Packer(8192, 48), 0, 0
    for tokens, tiles in sizes:
        row = packer.add(Packed(("s", 0, 0), 1, example(tokens, tiles)))
        if row:
            used, rows = used + 8192 - row.free_tokens, rows + 1
    fill = used / rows / 8192
    elements = [{"ids": np.zeros(tokens, bool), "tiles": np.zeros(tiles, bool)} for tokens, tiles in sizes]
    first_fit = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(elements).to_iter_dataset(),
        length_struct={"ids": 8192, "tiles": 48},
        num_packing_bins=16,
    )
    peer = np.mean([(row["ids_segment_ids"] > 0).mean() for row in first_fit])
    assert fill > 0.95
    assert fill > peer


def test_batches_have_positions_and_numbers_of_each_document():
    rows = []
    for parts in ([(3, 1, 7), (2, 0, 8)], [(4, 2, 9)]):
        row = Row(6, 3)
        for tokens, tiles, number in parts:
            row.add(Packed(("s", number, 0), number - 6, example(tokens, tiles, number)))
        rows.append(row)
    batch = make_batch(rows, 3, 6, 3, 2)
    np.testing.assert_array_equal(batch["ids"], [[7, 7, 7, 8, 8, 0], [9, 9, 9, 9, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["source_ids"], [[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch["loss_mask"][0], [False, False, False, True, True, False])
    seven, nine = (np.float32(n / 255 * 2 - 1) for n in (7, 9))
    np.testing.assert_allclose(batch["tiles"][:, :, 0, 0, 0], [[seven, 0, 0], [nine, nine, 0], [0, 0, 0]], atol=1e-6)
