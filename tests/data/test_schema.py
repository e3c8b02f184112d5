import base64
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.data.schema import DocumentError, PictureFiles, parse_document, parse_line


def parse(data, **options):
    return parse_document(data, "data.jsonl:7", **options)


def test_all_fields_find_their_place():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
        {"role": "assistant", "content": "4", "train": False},
    ]
    data = {"id": 3, "source": "web", "capability": "arith", "lang": "en", "messages": messages, "answer": "4"}
    document = parse(data | {"verifier": None})
    assert (document.id, document.source, document.capability, document.lang) == ("3", "web", "arith", "en")
    assert document.extra == {"answer": "4"}
    assert document.messages[1] == {"role": "assistant", "content": ({"type": "text", "text": "4"},), "train": False}
    assert document.where == "data.jsonl:7"


@pytest.mark.parametrize("field", ["text", "content"])
def test_text_alone_is_a_document(field):
    assert parse({field: "hello"}).content == ({"type": "text", "text": "hello"},)


def test_pictures_are_found_beside_the_file_and_not_read(tmp_path):
    files = PictureFiles.beside(tmp_path / "data.jsonl")
    video = {"type": "video", "frames": ["a.png", {"b64": base64.b64encode(b"xyz").decode()}], "fps": 2}
    document = parse({"content": [{"type": "image", "path": "sub/./a.png"}, video]}, pictures=files)
    image, video = document.content
    assert image == {"type": "image", "image": tmp_path / "sub" / "a.png"}
    assert video == {"type": "video", "frames": [tmp_path / "a.png", b"xyz"], "fps": 2}


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "sub/../../x.png", "link/x.png", "a\0.png"])
def test_pictures_outside_of_the_directory_are_refused(tmp_path, path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    files = PictureFiles.beside(tmp_path / "data" / "data.jsonl")
    with pytest.raises(DocumentError, match=r"data.jsonl:7: content\[0\].path: .* lies outside of .*picture_dir"):
        parse({"content": [{"type": "image", "path": path}]}, pictures=files)


def test_pictures_elsewhere_can_be_allowed(tmp_path):
    files = PictureFiles.beside(tmp_path / "data" / "data.jsonl", tmp_path)
    image = {"type": "image", "path": "../pictures/a.png"}
    assert parse({"content": [image]}, pictures=files).content[0]["image"] == tmp_path / "pictures" / "a.png"
    image["path"] = str(tmp_path / "b.png")
    assert parse({"content": [image]}, pictures=files).content[0]["image"] == tmp_path / "b.png"


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"the document: expected an object, got \[\]"),
        ({}, "it has none of messages, content, text; its fields are none"),
        ({"mesages": []}, "is mesages one of them, misspelt?"),
        ({"text": "a", "content": "b"}, "it has content and text; write one of them"),
        ({"text": ["a"]}, r"text: expected text, got \['a'\]; a list of items is called content"),
        ({"text": ""}, "it is empty"),
        ({"content": []}, "it is empty"),
        ({"messages": []}, "it is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "it is empty"),
        ({"text": "a", "lang": 3}, "lang: expected text, got 3"),
        ({"messages": {}}, "messages: expected a list"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object, got 'hi'"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\].role: nothing is not one of system, user"),
        ({"messages": [USER, {"role": "bot", "content": ""}]}, r"messages\[1\].role: 'bot' is not one of"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is missing"),
        ({"messages": [{**USER, "trian": False}]}, r"messages\[0\]: unknown field 'trian'; did you mean train?"),
        ({"messages": [{**USER, "train": 0}]}, r"messages\[0\].train: expected true or false, got 0"),
        ({"content": ["hi"]}, r"content\[0\]: expected an object, got 'hi'"),
        ({"content": [{"text": "hi"}]}, r"content\[0\].type: nothing is not one of text, image, video"),
        ({"content": [{"type": "txt", "text": "hi"}]}, r"content\[0\].type: 'txt' is not one of"),
        ({"content": [{"type": "text"}]}, r"content\[0\].text: expected text, got nothing"),
        ({"content": [{"type": "text", "text": "a", "lang": 1}]}, r"content\[0\]: unknown field 'lang'; known are"),
        ({"content": [{"type": "image"}]}, r"content\[0\]: a picture needs one of path and b64, it has neither"),
        ({"content": [{"type": "image", "path": "a", "b64": ""}]}, "it has path and b64"),
        ({"content": [{"type": "image", "path": 3}]}, r"content\[0\].path: expected text, got 3"),
        ({"content": [{"type": "image", "path": "a.png"}]}, "this source has no files beside it"),
        ({"content": [{"type": "image", "b64": "a b"}]}, r"content\[0\].b64: not base64"),
        ({"content": [{"type": "image", "bytes": "a"}]}, r"content\[0\].bytes: expected bytes, got 'a'"),
        ({"content": [{"type": "video", "frames": []}]}, r"content\[0\].frames: a video needs at least one frame"),
        ({"content": [{"type": "video", "frames": "a.gif"}]}, r"content\[0\].frames: expected a list"),
        ({"content": [{"type": "video", "frames": [3]}]}, r"content\[0\].frames\[0\]: expected an object, got 3"),
        ({"content": [{"type": "video", "frames": ["a"], "fps": 0}]}, r"content\[0\].fps: expected frames a second"),
    ],
)
def test_mistakes_name_place_and_field(data, message):
    with pytest.raises(DocumentError, match="^data.jsonl:7: .*" + message.replace("?", r"\?")):
        parse(data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: .* at column 2; write one object a line"),
        (b'{"text": "\xff"}', "not UTF-8 .byte 10."),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"1" * 10_000 + b"}", "not JSON: Exceeds the limit"),
        (b"  ", "not JSON: Expecting value"),
    ],
)
def test_lines_that_are_no_json_are_named(line, message):
    with pytest.raises(DocumentError, match="^f:1: .*" + message):
        parse_line(line, "f:1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("user"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "type", "path", "frames", "fps", "train", "messages", "b64"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "video"])},
        optional={"text": JSON, "path": JSON, "b64": JSON, "frames": JSON, "fps": JSON},
    ),
    max_size=3,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": ITEMS | JSON}, optional={"train": JSON}))


def refusal(line, files=None):
    """Returns the error of a line, None if it is a document."""
    try:
        document = parse_line(line, "data.jsonl:7", files)
    except DocumentError as error:
        return str(error)
    assert (document.messages is None) != (document.content is None)
    return None


@given(st.one_of(JSON, st.fixed_dictionaries({"content": ITEMS}), st.fixed_dictionaries({"messages": MESSAGES})))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_document_or_one_clear_line(data):
    error = refusal(json.dumps(data).encode(), PictureFiles.beside(Path("data.jsonl")))
    assert error is None or (error.startswith("data.jsonl:7: ") and "\n" not in error)


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_document_or_one_clear_line(line):
    error = refusal(line)
    assert error is None or error.startswith("data.jsonl:7: ")
