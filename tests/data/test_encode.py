import pickle

import numpy as np
import pytest

from l4jax.data.encode import Encoder, Skipped, to_levels, to_numbers
from l4jax.data.schema import DocumentError, PictureFiles, parse_document
from l4jax.processing.image import LEVELS


@pytest.fixture
def parse(tmp_path):
    return lambda **data: parse_document(data, "data.jsonl:7", PictureFiles.beside(tmp_path / "data.jsonl"))


@pytest.fixture
def make(processor):
    def make(row_tokens=1000, row_tiles=20, **options):
        return Encoder(processor, row_tokens, row_tiles, **options)

    return make


def learned(processor, example):
    return processor.decode(example.ids[example.loss_mask], skip_special=False)


def test_loss_counts_on_all_text_of_a_document_and_on_its_end(parse, make, processor, write_picture):
    image = {"type": "image", "path": write_picture("a.png", (56, 28))}
    (example,) = make()(parse(content=[{"type": "text", "text": "before "}, image, {"type": "text", "text": "after"}]))
    assert learned(processor, example) == "before after<|end_of_text|>"
    assert example.ids[0] == processor.tokenizer.bos_id
    assert len(example.tiles) == 3
    assert (example.ids == processor.tokenizer.special["<|patch|>"]).sum() == 3 * 4


def test_loss_counts_on_what_the_assistant_says(parse, make, processor):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "train": False},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "6"},
    ]
    (example,) = make()(parse(messages=messages))
    assert learned(processor, example) == "6<|eot|>"
    whole = processor.encode(messages, add_generation_prompt=False)
    np.testing.assert_array_equal(example.ids, whole.ids)


def test_pictures_that_the_assistant_shows_are_not_learned(parse, make, processor, write_picture):
    answer = [{"type": "image", "path": write_picture("a.png")}, {"type": "text", "text": "here"}]
    messages = [{"role": "user", "content": "show me"}, {"role": "assistant", "content": answer}]
    (example,) = make()(parse(messages=messages))
    assert learned(processor, example) == "here<|eot|>"


def test_tool_calls_and_results(parse, make, processor):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    (example,) = make()(parse(messages=messages, tools=[{"type": "function", "function": {"name": "add"}}]))
    words = learned(processor, example)
    assert words.endswith("<|eom|>three<|eot|>")
    assert '"add"' in words
    assert '"name": "add"' in processor.decode(example.ids[~example.loss_mask])


def test_frames_come_after_their_time(parse, make, processor, write_picture):
    frames = [write_picture(f"{i}.png", seed=i) for i in range(3)]
    (example,) = make()(parse(content=[{"type": "video", "frames": frames, "fps": 2}]))
    assert learned(processor, example) == "[00:00.0][00:00.5][00:01.0]<|end_of_text|>"
    assert len(example.tiles) == 3


def test_tiles_survive_as_bytes(processor):
    np.testing.assert_array_equal(to_numbers(np.arange(256, dtype=np.uint8)), LEVELS)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    from PIL import Image

    encoded = processor.encode_document([{"type": "image", "image": Image.fromarray(pixels)}])
    np.testing.assert_array_equal(to_numbers(to_levels(encoded)), encoded.tiles)
    np.testing.assert_array_equal(to_levels(encoded)[0].transpose(1, 2, 0), pixels)


# --- What does not fit ----------------------------------------------------------------------------------------------


def test_long_documents_stop_or_are_dropped(parse, make, write_picture):
    text = parse(text="x" * 50)
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: it has 52 tokens, a row has room for data.row_tokens=40;"):
        make(40)(text)
    reason = make(40, long_documents="drop")(text).reason
    assert reason.startswith("data.jsonl:7: it has 52 tokens")
    assert reason.endswith("raise it to keep such documents")
    picture = parse(content=[{"type": "image", "path": write_picture("a.png", (56, 56))}])
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: it has 5 tiles, a row has room for data.row_tiles=4;"):
        make(row_tiles=4)(picture)
    assert len(make(52, 5)(text)) == 1


def test_split_documents_lose_nothing(parse, make, write_picture):
    small, wide = write_picture("small.png"), write_picture("wide.png", (56, 28), seed=1)
    text = {"type": "text", "text": "a longer text "}
    content = [text, {"type": "image", "path": small}, text, {"type": "image", "path": wide}, text, text]
    document = parse(content=content * 3)
    (whole,) = make()(document)
    for row_tokens, row_tiles in [(30, 20), (40, 3), (25, 3), (200, 4), (37, 5)]:
        pieces = make(row_tokens, row_tiles, long_documents="split")(document)
        assert all(len(piece.ids) <= row_tokens and len(piece.tiles) <= row_tiles for piece in pieces)
        for name in ("ids", "loss_mask", "tiles"):
            joined = np.concatenate([getattr(piece, name) for piece in pieces])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        for piece in pieces:  # a picture is whole, and beside its tiles
            assert (piece.ids == 266).sum() == (piece.ids == 267).sum()
            assert (piece.ids == 271).sum() == 4 * len(piece.tiles)


def test_what_cannot_be_split_is_named(parse, make, write_picture):
    split = make(30, 2, long_documents="split")
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: .*; a conversation is not split"):
        split(parse(messages=[{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y"}]))
    picture = {"type": "image", "path": write_picture("a.png", (56, 28))}
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: .*; a picture in it is larger than a row"):
        split(parse(content=[{"type": "text", "text": "x"}, picture, {"type": "text", "text": "y"}]))


# --- What cannot be encoded -----------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_read_are_named_with_their_place(parse, make, tmp_path, write_picture):
    content = (tmp_path / write_picture("a.png", (200, 200))).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    cut = parse(content=[{"type": "text", "text": "x"}, {"type": "image", "path": "cut.png"}])
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: .*cut.png is damaged or cut short: .*; fetch it again"):
        make()(cut)
    absent = parse(content=[{"type": "image", "path": "absent.png"}])
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: no picture .*absent.png; check the path"):
        make()(absent)
    assert isinstance(make(skip_malformed=True)(cut), Skipped)
    assert "absent.png" in make(skip_malformed=True)(absent).reason


def test_pictures_for_a_model_of_text_alone_are_named(parse, reader, write_picture):
    document = parse(content=[{"type": "image", "path": write_picture("a.png")}])
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: this model reads only text"):
        Encoder(reader, 100, 0)(document)


@pytest.mark.parametrize("train", [None, False])
def test_nothing_to_learn_is_a_mistake(parse, make, train):
    messages = [{"role": "user", "content": "?"}]
    if train is not None:
        messages.append({"role": "assistant", "content": "!", "train": train})
    with pytest.raises(DocumentError, match=r"^data.jsonl:7: nothing to learn"):
        make()(parse(messages=messages))


def test_skipped_documents_pass(make):
    assert make()(Skipped("data.jsonl:3: not JSON")) == Skipped("data.jsonl:3: not JSON")


def test_encoders_pickle(make, parse):
    document = parse(text="hello")
    (one,), (other,) = make()(document), pickle.loads(pickle.dumps(make()))(document)
    np.testing.assert_array_equal(one.ids, other.ids)
