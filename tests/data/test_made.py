"""Documents made on this machine, read again by other means."""

import itertools

import numpy as np
import pytest

from l4jax.config import PRESETS
from l4jax.data.config import CaptionsConfig, DataConfig, PythonDocsConfig, RecallConfig, SourceConfig
from l4jax.data.made import FILLER, NUMBERS, VALUES, Captions, PythonDocs, Recall
from l4jax.data.streams import make_batches, make_eval_batches, make_processor

MODEL = PRESETS["small-scout"]


def rng(seed=0):
    return np.random.default_rng(seed)


def caption(made, index, seed=0):
    image, text = made.document(index, rng(seed)).content
    return image["image"], text["text"]


def test_captions_name_the_digit_and_a_share_of_them_another_one():
    right, noisy, again = (
        Captions(CaptionsConfig(wrong_fraction=fraction), 28, seed) for fraction, seed in ((0, 1), (0.5, 1), (0.5, 1))
    )
    names = [[caption(made, i)[1] for i in range(400)] for made in (right, noisy, again)]
    assert set(names[0]) == {f"a handwritten {number}" for number in NUMBERS}
    assert names[1] == names[2]  # fixed for each picture
    assert np.mean([a != b for a, b in zip(*names[:2], strict=True)]) == pytest.approx(0.5, abs=0.08)


def test_pictures_of_a_digit_differ_from_pass_to_pass_and_blank_ones_are_black():
    made = Captions(CaptionsConfig(), 28, 0)
    first, again, other = (np.asarray(caption(made, 3, seed)[0]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert not np.asarray(caption(Captions(CaptionsConfig(blank_images=True), 28, 0), 3)[0]).any()


def test_help_texts_are_in_one_part_and_short():
    parts = [PythonDocs(PythonDocsConfig(part=part, piece_bytes=90)) for part in ("train", "held_out")]
    train, held_out = ([made.document(i, rng()).content[0]["text"] for i in range(len(made))] for made in parts)
    assert 0.04 < len(held_out) / len(train) < 0.25
    assert len(set(held_out) & set(train)) < 0.05 * len(held_out)  # headings and short examples
    assert all(len(text.encode()) <= 90 for text in train + held_out)
    assert sum(map(len, train)) > 250_000


def read(document, length):
    """Returns the symbols of a document, and at which places they count."""
    symbols, learned = ["<"], set()
    for item in document.content:
        if item.get("train") is not False:
            learned |= set(range(len(symbols), len(symbols) + len(item["text"])))
        symbols += item["text"]
    assert len(symbols) == length - 1  # the last token ends the text
    return symbols, learned


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize(("length", "pairs"), [(128, 10), (256, 30)])
def test_values_asked_for_were_given_near_or_far(distance, length, pairs, everywhere):
    config = RecallConfig(
        length=length, pairs=pairs, chunk=32, distance=distance, ask_everywhere=everywhere, learn_echoes=False
    )
    asked = set()
    for seed in range(20):
        symbols, learned = read(Recall(config).document(0, rng(seed)), length)
        assert learned
        for place in learned:
            value, key = symbols[place], symbols[place - 1]
            assert value in VALUES
            assert symbols[place + 1 : place + 2] in ([key], [])
            given = [i for i in range(place - 1) if symbols[i] == key and symbols[i + 1] == value and i + 1 < place]
            same_chunk = [i for i in given if i // 32 == place // 32]
            assert given
            assert bool(same_chunk) == (distance == "near"), (symbols, place)
            asked.add(place // 32)
    assert (len(asked) > 1) == everywhere
    assert length // 32 - 1 in asked


def test_a_value_cannot_be_guessed():
    config = RecallConfig(length=128, pairs=10, chunk=32, distance="far", learn_echoes=False)
    values = [
        s[p] for seed in range(60) for s, learned in [read(Recall(config).document(0, rng(seed)), 128)] for p in learned
    ]
    counts = np.array([values.count(value) for value in VALUES]) / len(values)
    assert counts.max() < 0.12  # of sixteen
    assert FILLER not in values


def test_echoes_are_learned_in_training():
    config = RecallConfig(length=128, pairs=10, chunk=32, distance="far")
    symbols, learned = read(Recall(config).document(0, rng()), 128)
    echoes = [place for place in learned if symbols[place] not in VALUES]
    assert echoes
    assert all(symbols[place] == symbols[place - 2] for place in echoes)


@pytest.mark.parametrize(
    "settings", [{"pairs": 47}, {"chunk": 0}, {"questions": 0}, {"length": 100}, {"length": 64, "pairs": 12}]
)
def test_impossible_recall_is_refused(settings):
    with pytest.raises(ValueError, match=r"recall\."):
        RecallConfig(**{"length": 128, "pairs": 10, "chunk": 32} | settings)


def test_an_evaluation_reads_every_document_once_and_the_same_every_time(tmp_path):
    lines = "\n".join(f'{{"text": "document number {i}"}}' for i in range(23))
    (tmp_path / "web.jsonl").write_text(lines)
    sources = {
        "web": SourceConfig(path=str(tmp_path / "web.jsonl")),
        "digits": SourceConfig(captions=CaptionsConfig(part="held_out")),
    }
    config = DataConfig(sources=sources, rows=4, row_tokens=128, row_tiles=4, shuffle=False)
    processor = make_processor(config, MODEL)
    passes = [list(itertools.chain(*make_eval_batches(config, processor, 0, tmp_path))) for _ in range(2)]
    for one, other in zip(*passes, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    counts = {1: 0, 2: 0}
    for batch in passes[0]:
        for row in range(4):
            for document in range(1, batch["segment_ids"][row].max() + 1):
                counts[int(batch["source_ids"][row][batch["segment_ids"][row] == document][0])] += 1
    assert counts == {1: 23, 2: 297}


def test_texts_that_are_not_to_be_learned_are_not(tmp_path):
    (tmp_path / "web.jsonl").write_text(
        '{"content": [{"type": "text", "text": "given ", "train": false}, {"type": "text", "text": "learned"}]}\n'
        '{"content": [{"type": "text", "text": "learned "}, {"type": "text", "text": "given", "train": false}]}'
    )
    config = DataConfig(
        sources={"web": SourceConfig(path=str(tmp_path / "web.jsonl"))}, rows=1, row_tokens=64, shuffle=False
    )
    processor = make_processor(config, MODEL)
    batch = next(iter(make_batches(config, processor, 0, tmp_path)))
    for document, said in ((1, "learned<|end_of_text|>"), (2, "learned ")):
        at = (batch["segment_ids"][0] == document) & batch["loss_mask"][0]
        assert processor.decode(batch["ids"][0][at], skip_special=False) == said


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "must have one of path, digits, captions, python_docs, recall"),
        ({"path": "x", "python_docs": PythonDocsConfig()}, "must have one of"),
    ],
)
def test_a_source_is_one_thing(source, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(sources={"web": SourceConfig(**source)}, rows=1, row_tokens=64)
