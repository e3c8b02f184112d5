"""The tokenizer against Meta's, in both file formats, and what must hold of any text."""

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4jax.processing.tokenizer import (
    WORD_PATTERN,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    special_tokens,
    split_text,
)

# The ids that the sheets of the released models name.
RELEASED_IDS = {
    **{"<|begin_of_text|>": 200000, "<|end_of_text|>": 200001, "<|fim_suffix|>": 200004, "<|header_start|>": 200005},
    **{"<|header_end|>": 200006, "<|eom|>": 200007, "<|eot|>": 200008, "<|step|>": 200009, "<|python_start|>": 200016},
    **{"<|python_end|>": 200017, "<|finetune_right_pad|>": 200018, "<|image_start|>": 200080, "<|image_end|>": 200081},
    **{"<|tile_x_separator|>": 200084, "<|tile_y_separator|>": 200085, "<|image|>": 200090, "<|patch|>": 200092},
    **{"<|text_post_train_reserved_special_token_8|>": 200019, "<|text_post_train_reserved_special_token_68|>": 200079},
    **{"<|vision_reserved_special_token_1047|>": 201133, "<|reasoning_thinking_start|>": 201142},
    **{"<|reserved_special_token_0|>": 201144, "<|reserved_special_token_903|>": 202047},
}
SCRIPTS = [
    *[(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x58A), (0x5D0, 0x5EA), (0x620, 0x6FF)],
    *[(0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE5B), (0x1000, 0x109F), (0x10A0, 0x10FF)],
    *[(0x1200, 0x137F), (0x1780, 0x17FF), (0x2000, 0x206F), (0x2190, 0x22FF), (0x2500, 0x25FF), (0x3040, 0x30FF)],
    *[(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x1D400, 0x1D7FF)],
]
WORDS = [
    *("The quick brown fox", "don't", "WE'LL", "I'd've", "naïve", "Straße", "Łódź", "çok güzel", "Привет, мир!"),
    *(
        "你好\uff0c世界。",
        "こんにちは",
        "안녕하세요",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "สวัสดี",
        "3.14159",
        "1234567890",
        "0x7fffffff",
    ),
    *("👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "🏳️‍🌈", "e\u0301", "\u200d", "\u00a0", "\ufeff", "\x00", "\x1b[31m", "½", "Ⅷ", "ﬁ"),
    *("def f(x):\n    return x**2\n", "{'a': [1, 2]}", "for(;;){}", "<div class='a'>", "https://a.b/c?d=e&f=%20"),
    *("<|eot|>", "<|begin_of_text|>", "<|header_start|>user<|header_end|>", "<|image|>", "<|python_start|>", "<|"),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\t\t ",
        "   \n",
        "...",
        "!!!",
        "--",
        "\\n",
        "/* */",
        "a_b_c",
        "CamelCase",
    ),
]


def texts(count: int = 10_000) -> list[str]:
    """Returns `count` strings, the same every time."""
    rng = random.Random(20250405)
    result = ["", *WORDS]
    while len(result) < count - 12:
        kind = rng.random()
        if kind < 0.4:
            result.append("".join(rng.choice(WORDS) + rng.choice(["", " ", "\n"]) for _ in range(rng.randint(1, 12))))
        elif kind < 0.8:
            low, high = rng.choice(SCRIPTS)
            spaces = rng.choice(["", " ", "  \n"])
            result.append(
                "".join(chr(rng.randint(low, high)) + (spaces if rng.random() < 0.2 else "") for _ in range(30))
            )
        elif kind < 0.95:
            scripts = rng.choices(SCRIPTS, k=rng.randint(1, 40))
            result.append("".join(chr(rng.randint(*script)) for script in scripts))
        else:
            result.append(rng.choice(["a", " ", "\n", "0", "é", "漢", "🦙", "ab", "=", "\t"]) * rng.randint(1, 2000))
    result += [c * n for c in ("a", " ", "\n", "é") for n in (24_999, 25_001)]
    result += ["a" * 60_000 + " " * 60_000 + "b", "x y" * 30_000, "word " * 90_000, "漢" * 70_000]
    return result


# A vocabulary made by hand: all bytes and a few merges, in the order in which they are merged.
MERGES = [b"th", b"the", b" t", b" the", b"\xc3\xa9", b"in", b"ing", b"\n\n"]


def write_model(path, merges=tuple(MERGES)):
    tokens = [*(bytes([b]) for b in range(256)), *merges]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


# GPT-2's spelling of bytes as characters, as in tokenizer.json.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
SPELLING = [chr(b) if b in PRINTABLE else chr(256 + OTHERS.index(b)) for b in range(256)]


def spell(token: bytes) -> str:
    return "".join(SPELLING[byte] for byte in token)


def write_json(path, ranks, merges, added=()):
    content = {
        "added_tokens": [{"id": index, "content": name, "special": True} for index, name in added],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "model": {"type": "BPE", "vocab": {spell(token): rank for token, rank in ranks.items()}, "merges": merges},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    return Tokenizer.from_file(write_model(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


def test_special_ids_are_the_released_ones():
    special = special_tokens(200000)
    assert {name: special[name] for name in RELEASED_IDS} == RELEASED_IDS
    assert sorted(special.values()) == list(range(200000, 202048))


@pytest.mark.oracle
def test_special_ids_equal_meta(tokenizer, meta_tokenizer):
    assert tokenizer.special == meta_tokenizer.special_tokens
    assert tokenizer.vocab_size == meta_tokenizer.n_words == 202048
    assert sorted(tokenizer.stop_ids) == sorted(meta_tokenizer.stop_tokens)
    assert tokenizer.pad_id == meta_tokenizer.pad_id


@pytest.mark.oracle
def test_ids_equal_meta_on_ten_thousand_texts(tokenizer, meta_tokenizer):
    strings = texts()
    assert len(strings) >= 10_000
    different = [
        s[:60] for s in strings if tokenizer.encode(s, bos=True) != meta_tokenizer.encode(s, bos=True, eos=False)
    ]
    assert different == []


@pytest.mark.oracle
def test_decode_equals_meta(tokenizer, meta_tokenizer):
    for text in texts(2000)[:1500]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == meta_tokenizer.decode(ids) == text
        assert tokenizer.decode(ids[1:]) == meta_tokenizer.decode(ids[1:])  # may begin inside a character


@pytest.mark.oracle
def test_tokenizer_json_holds_the_same_ranks(tokenizer, tokenizer_model, tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocab, merges = TikTokenConverter(str(tokenizer_model)).extract_vocab_merges_from_model(str(tokenizer_model))
    assert {spell(token): rank for token, rank in tokenizer.ranks.items()} == vocab
    added = [(index, name) for name, index in tokenizer.special.items()]
    path = write_json(tmp_path / "tokenizer.json", tokenizer.ranks, [list(pair) for pair in merges], added)
    converted = Tokenizer.from_file(path)
    assert converted.ranks == tokenizer.ranks
    assert converted.special == tokenizer.special
    text = "".join(texts(200)[:150])
    assert converted.encode(text) == tokenizer.encode(text)


def test_tokenizer_json_equals_tokenizer_model(small_tokenizer, tmp_path):
    merges = ["t h", ["th", "e"], f"{spell(b' ')} t", f"{spell(b' ')} the"]
    added = [(264, "<|begin_of_text|>"), (264 + 1134, "<|finetune_right_pad_id|>")]
    converted = Tokenizer.from_file(write_json(tmp_path / "tokenizer.json", small_tokenizer.ranks, merges, added))
    assert converted.ranks == small_tokenizer.ranks
    assert converted.encode("the thing\n\nét") == small_tokenizer.encode("the thing\n\nét")
    assert converted.decode([264 + 1134]) == "<|finetune_right_pad_id|>"  # the file's name for a reserved id
    assert converted.pad_id == small_tokenizer.pad_id == 264 + 18


def test_merges_follow_the_ranks(small_tokenizer):
    assert small_tokenizer.encode("the the", bos=True, eos=True) == [264, 257, 259, 265]
    assert small_tokenizer.vocab_size == 264 + 2048


def test_control_tokens_in_text_stay_text(small_tokenizer, byte_tokenizer):
    for tokenizer in (small_tokenizer, byte_tokenizer):
        for name in tokenizer.special:
            ids = tokenizer.encode(f"a {name} b")
            assert not set(ids) & set(tokenizer.special.values())
            assert tokenizer.decode(ids) == f"a {name} b"


@given(st.text())
def test_round_trip(small_tokenizer, byte_tokenizer, text):
    for tokenizer in (small_tokenizer, byte_tokenizer):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids, skip_special=True) == text
        assert tokenizer.decode(ids) == f"<|begin_of_text|>{text}<|end_of_text|>"


def test_lone_surrogates_become_a_replacement_character(small_tokenizer, byte_tokenizer):
    for tokenizer in (small_tokenizer, byte_tokenizer):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@given(st.lists(st.integers(0, 271)))
def test_stream_equals_decode(byte_tokenizer, ids):
    for skip in (True, False):
        stream = StreamDecoder(byte_tokenizer, skip_special=skip)
        pieces = [stream.push(index) for index in ids] + [stream.finish()]
        assert "".join(pieces) == byte_tokenizer.decode(ids, skip_special=skip)


def test_stream_holds_back_unfinished_characters(byte_tokenizer):
    stream = StreamDecoder(byte_tokenizer)
    assert [stream.push(byte) for byte in "é🦙".encode()] == ["", "é", "", "", "", "🦙"]
    assert [stream.push(0xF0), stream.finish(), stream.push(ord("a"))] == ["", "\ufffd", "a"]


def test_long_text_is_cut_as_meta_cuts_it():
    text = "a" * 60_000 + " " * 30_000 + "b " * 200_000
    pieces = list(split_text(text))
    assert [len(piece) for piece in pieces] == [25_000, 25_000, 35_000, 315_000, 90_000]
    assert "".join(pieces) == text


@pytest.mark.oracle
def test_cuts_equal_meta(meta_tokenizer):
    for text in [" ", "a" * 25_001, " " * 25_000 + "x" * 50_001, "ab " * 20_000 + "\u2028" * 26_000]:
        assert list(split_text(text)) == list(meta_tokenizer._split_whitespaces_or_nonwhitespaces(text, 25_000))


def test_byte_tokenizer_fills_the_vocabulary_asked_for():
    tokenizer = ByteTokenizer(512)
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode([511], skip_special=True) == ""
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id) == (256, (257, 258, 259), 260)
    with pytest.raises(ValueError, match="at least 272"):
        ByteTokenizer(271)


def test_save_and_load(small_tokenizer, tmp_path):
    for name, tokenizer in {"bpe": small_tokenizer, "bytes": ByteTokenizer(300)}.items():
        (tmp_path / name).mkdir()
        saved = tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        assert loaded.special == tokenizer.special
        assert loaded.save(tmp_path / name) == saved  # onto itself


@pytest.mark.parametrize("index", [-1, 272, 10**9])
def test_ids_outside_the_vocabulary_are_refused(byte_tokenizer, index):
    with pytest.raises(ValueError, match=f"token id {index} is outside"):
        byte_tokenizer.decode([65, index])


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*expected tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")
    damaged = {
        "tokenizer.model": [b"YQ== 0\nYg==", b"YQ== 0\n", b"\xff\xfe", b""],
        "tokenizer.json": [b"{", b"[]", b"{}", b'{"model": {"type": "BPE", "vocab": {"a": []}}}', b'{"model": "BPE"}'],
        "byte_tokenizer.json": [b"{}", b"nonsense", b'{"vocab_size": 10}'],
    }
    for name, contents in damaged.items():
        for number, content in enumerate(contents):
            directory = tmp_path / f"{name}-{number}"
            directory.mkdir()
            (directory / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"."):
                load_tokenizer(directory)


def test_json_with_another_merge_order_is_refused(small_tokenizer, tmp_path):
    path = write_json(tmp_path / "tokenizer.json", small_tokenizer.ranks, ["th e", "t h"])
    with pytest.raises(ValueError, match="another order"):
        Tokenizer.from_file(path)
