import json
import warnings

import numpy as np
import pytest

from l4jax.data.config import DataConfig, SourceConfig
from l4jax.data.encode import to_numbers
from l4jax.data.streams import make_batches, make_encoder

ROWS, TOKENS, TILES = 3, 160, 8


@pytest.fixture
def texts(write_jsonl):
    return write_jsonl([{"text": f"text {i} " + "y" * (i * 7 % 50)} for i in range(23)], "texts.jsonl")


def settings(many_documents, texts=None, weight=2.0, **fields):
    sources = {"all": SourceConfig(path=str(many_documents))}
    if texts is not None:
        sources["texts"] = SourceConfig(path=str(texts), weight=weight)
    return DataConfig(sources=sources, **({"rows": ROWS, "row_tokens": TOKENS, "row_tiles": TILES} | fields))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def documents_of(batch):
    """Yields (ids, loss_mask, positions, source_id, tiles) of every packed document."""
    for b in range(len(batch["ids"])):
        first = 0
        for segment in range(1, batch["segment_ids"][b].max() + 1):
            mine = batch["segment_ids"][b] == segment
            ids = batch["ids"][b, mine]
            count = (ids == 271).sum() // 4  # patch tokens, 4 a tile
            yield (
                *(batch[name][b, mine] for name in ("ids", "loss_mask", "positions")),
                set(batch["source_ids"][b, mine].tolist()),
                batch["tiles"][b, first : first + count],
            )
            first += count
        assert not batch["tiles"][b, first:].any()


def test_packed_rows_hold_the_documents_as_they_are_alone(many_documents, texts, processor, tmp_path):
    config = settings(many_documents, texts)
    data = make_batches(config, processor, 0, tmp_path)
    encoder = make_encoder(config, processor)
    alone = {}
    for number, name in enumerate(config.sources, start=1):
        documents = data.streams[name].documents
        for index in range(data.streams[name].length):
            (example,) = encoder(documents[index])
            alone[example.ids.tobytes()] = number, example
    seen = set()
    for batch in take(iter(data), 20):
        assert {name: array.shape for name, array in batch.items()} == {
            **dict.fromkeys(["ids", "positions", "segment_ids", "loss_mask", "source_ids", "pictures"], (ROWS, TOKENS)),
            "tiles": (ROWS, TILES, 3, 28, 28),
        }
        np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["source_ids"] > 0)
        assert batch["pictures"].any() == batch["tiles"].any()
        for ids, loss_mask, positions, source_ids, tiles in documents_of(batch):
            number, example = alone[ids.tobytes()]
            assert source_ids == {number}
            np.testing.assert_array_equal(loss_mask, example.loss_mask)
            np.testing.assert_array_equal(positions, np.arange(len(ids)))
            np.testing.assert_array_equal(tiles, to_numbers(example.tiles))
            seen.add(ids.tobytes())
    assert len(seen) > 60  # most of the 83


def test_a_pass_gives_every_document_once_and_the_next_in_another_order(texts, reader, tmp_path):
    config = DataConfig(sources={"texts": SourceConfig(path=str(texts))}, rows=1, row_tokens=100)
    documents = make_batches(config, reader, 0, tmp_path).streams["texts"].documents
    first, second = ([documents[i + start].where for i in range(23)] for start in (0, 23))
    assert len(set(first)) == 23
    assert sorted(first) == sorted(second)
    assert first != second


def test_order_depends_on_seed_and_name_and_can_be_that_of_the_file(texts, reader, tmp_path):
    def order(seed=0, name="texts", **fields):
        config = DataConfig(sources={name: SourceConfig(path=str(texts))}, rows=1, row_tokens=100, **fields)
        documents = make_batches(config, reader, seed, tmp_path).streams[name].documents
        return [int(documents[i].where.rpartition(":")[2]) for i in range(23)]

    assert order() == order()
    assert len({tuple(order()), tuple(order(seed=1)), tuple(order(name="other"))}) == 3
    assert order(shuffle=False) == list(range(1, 24))


@pytest.mark.parametrize("weight", [0.5, 2.0, 3.0])
def test_documents_are_drawn_by_weight(many_documents, texts, processor, tmp_path, weight):
    batches = take(iter(make_batches(settings(many_documents, texts, weight), processor, 0, tmp_path)), 30)
    sources = [min(source) for batch in batches for _, _, _, source, _ in documents_of(batch)]
    assert sources.count(2) / sources.count(1) == pytest.approx(weight, rel=0.15)


@pytest.mark.parametrize("before", [1, 5, 17])
def test_goes_on_bit_for_bit_in_the_middle_of_a_pass_and_of_rows(many_documents, texts, processor, tmp_path, before):
    data = make_batches(settings(many_documents, texts), processor, 0, tmp_path)
    iterator = iter(data)
    take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["open"]
    expected = take(iterator, 20)

    other = iter(make_batches(settings(many_documents, texts), processor, 0, tmp_path))
    take(other, 2)  # what it did before does not matter
    other.set_state(state)
    assert other.get_state() == state
    assert_same(take(other, 20), expected)


def test_worker_processes_change_nothing_and_their_number_may_change(many_documents, texts, processor, tmp_path):
    config = settings(many_documents, texts)
    alone = iter(make_batches(config, processor, 0, tmp_path))
    expected = take(alone, 30)

    workers = iter(make_batches(settings(many_documents, texts, num_workers=2), processor, 0, tmp_path))
    assert_same(take(workers, 8), expected[:8])
    state = workers.get_state()
    assert_same(take(workers, 4), expected[8:12])
    workers.set_state(state)
    assert_same(take(workers, 2), expected[8:10])
    state = json.loads(json.dumps(workers.get_state()))
    workers.close()

    alone.set_state(state)
    assert_same(take(alone, 20), expected[10:])


def test_weights_may_change_and_each_document_still_comes_once_a_pass(many_documents, texts, processor, tmp_path):
    iterator = iter(make_batches(settings(many_documents, texts, 1.0), processor, 0, tmp_path))
    before = take(iterator, 2)
    state = iterator.get_state()

    changed = iter(make_batches(settings(many_documents, texts, 4.0), processor, 0, tmp_path))
    changed.set_state(state)
    after = take(changed, 8)
    sources = [min(source) for batch in after[3:] for _, _, _, source, _ in documents_of(batch)]
    assert sources.count(2) / sources.count(1) == pytest.approx(4.0, rel=0.3)
    # Nothing is lost or doubled over the change: the documents of both parts are those of the stream, up to what waits.
    drawn = [ids.tobytes() for batch in before + after for ids, _, _, source, _ in documents_of(batch) if source == {1}]
    stream = make_batches(settings(many_documents, texts), processor, 0, tmp_path).encoded("all")
    waiting = sum(name == "all" for row in changed.get_state()["open"] for name, _, _ in row)
    waiting += sum(name == "all" for row in changed.get_state()["closed"] for name, _, _ in row)
    taken = changed.get_state()["taken"]["all"]
    assert len(drawn) == taken - waiting
    assert set(drawn) <= {example.ids.tobytes() for i in range(taken) for example in stream[i]}
    assert len(set(drawn)) == len(drawn) or taken > 60


def test_sources_may_come_and_go(many_documents, texts, processor, tmp_path):
    both, one = settings(many_documents, texts), settings(many_documents)
    iterator = iter(make_batches(both, processor, 0, tmp_path))
    take(iterator, 4)
    left = iter(make_batches(one, processor, 0, tmp_path))
    left.set_state(iterator.get_state())
    assert {1} == set().union(*(source for batch in take(left, 4) for _, _, _, source, _ in documents_of(batch)))
    back = iter(make_batches(both, processor, 0, tmp_path))
    back.set_state(left.get_state())
    assert {1, 2} == set().union(*(source for batch in take(back, 4) for _, _, _, source, _ in documents_of(batch)))


def test_shards_divide_the_documents(many_documents, texts, processor, tmp_path):
    config = settings(many_documents, texts, rows=4)
    whole = make_batches(config, processor, 0, tmp_path)
    shards = [make_batches(config, processor, 0, tmp_path, shard=(i, 2)) for i in range(2)]
    assert [shard.rows for shard in shards] == [2, 2]
    for name in config.sources:
        every = [whole.encoded(name)[i][0].ids.tobytes() for i in range(40)]
        for i, shard in enumerate(shards):
            assert [shard.encoded(name)[j][0].ids.tobytes() for j in range(20)] == every[i::2]


def test_another_number_of_shards_is_one_clear_line(many_documents, processor, tmp_path):
    config = settings(many_documents, rows=4)
    state = iter(make_batches(config, processor, 0, tmp_path, shard=(1, 2))).get_state()
    alone = iter(make_batches(config, processor, 0, tmp_path))
    with pytest.raises(ValueError, match=r"process 2 of 2, this is process 1 of 1; .* go on with 2 processes"):
        alone.set_state(state)
    with pytest.raises(ValueError, match=r"data.rows=4 is not divisible by the 3 processes"):
        make_batches(config, processor, 0, tmp_path, shard=(0, 3))


def test_changed_data_are_one_clear_line(texts, reader, tmp_path):
    config = DataConfig(sources={"texts": SourceConfig(path=str(texts))}, rows=1, row_tokens=100)
    state = iter(make_batches(config, reader, 0, tmp_path)).get_state()
    with texts.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"texts had 23 documents and has 24 now; bring the old files back"):
        iter(make_batches(config, reader, 0, tmp_path)).set_state(state)


def test_rows_of_text_alone_have_no_tiles(texts, reader, tmp_path):
    config = DataConfig(sources={"texts": SourceConfig(path=str(texts))}, rows=2, row_tokens=100, row_tiles=4)
    batch = next(iter(make_batches(config, reader, 0, tmp_path)))
    assert batch["tiles"] is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_malformed_line_stops_with_its_place(write_jsonl, reader, tmp_path, num_workers):
    path = write_jsonl(["{", *[{"text": "good"}] * 40])
    config = DataConfig(
        sources={"one": SourceConfig(path=str(path))}, rows=2, row_tokens=100, shuffle=False, num_workers=num_workers
    )
    iterator = iter(make_batches(config, reader, 0, tmp_path))
    with pytest.raises(ValueError, match=r"data.jsonl:1: not JSON: .*data.skip_malformed=true leaves"):
        take(iterator, 5)
    iterator.close()


def test_malformed_lines_are_left_out_named_and_counted_when_asked(write_jsonl, reader, tmp_path):
    path = write_jsonl(['{"text": 1}', *({"text": f"good {i}"} for i in range(5)), '{"text": ""}'])
    config = DataConfig(
        sources={"one": SourceConfig(path=str(path))}, rows=2, row_tokens=100, shuffle=False, skip_malformed=True
    )
    iterator = iter(make_batches(config, reader, 0, tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = take(iterator, 4)
    messages = [str(warning.message) for warning in caught]
    assert "data.jsonl:1: text: expected text, got 1" in messages[0]
    assert "data.jsonl:7: it is empty" in messages[1]
    assert iterator.get_state()["skipped"] >= 8
    assert len(messages) == 10 + (iterator.get_state()["skipped"] >= 100)
    assert all(b"good" in ids.astype(np.uint8).tobytes() for batch in batches for ids, *_ in text_documents(batch))


def text_documents(batch):
    for b in range(len(batch["ids"])):
        for segment in range(1, batch["segment_ids"][b].max() + 1):
            yield (batch["ids"][b, batch["segment_ids"][b] == segment],)


def test_a_source_without_documents_is_named(write_jsonl, reader, tmp_path):
    path = write_jsonl([])
    config = DataConfig(sources={"nothing": SourceConfig(path=str(path))}, rows=2, row_tokens=100)
    with pytest.raises(ValueError, match=r"data.sources.nothing: .*data.jsonl holds no documents"):
        make_batches(config, reader, 0, tmp_path)
