import gzip
import json
import os
import pickle
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from l4jax.data.schema import DocumentError
from l4jax.data.sources import JsonlSource, ParquetSource, TfdsSource, line_index, open_source
from l4jax.data.write import to_json, write_tfds


def texts(source):
    return [source[i].content[0]["text"] for i in range(len(source))]


# --- JSONL ----------------------------------------------------------------------------------------------------------


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text":"a"}\r\n\r\n\n{"text":"b"}\n  \n{"text":"c"}')
    source = JsonlSource(path)
    assert [source[i].where for i in (0, 1, 3)] == [f"{path}:{number}" for number in (1, 4, 6)]
    assert [source[i].content[0]["text"] for i in (0, 1, 3)] == ["a", "b", "c"]
    with pytest.raises(DocumentError, match=r"data.jsonl:5: not JSON"):
        source[2]


@given(st.lists(st.binary(max_size=6)), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_line_index_equals_splitting(tmp_path_factory, lines, block):
    path = tmp_path_factory.mktemp("index") / "lines"
    content = b"\n".join(line.replace(b"\n", b"") for line in lines)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l4jax.data.sources.BLOCK_BYTES", block)
        found = [(content[begin:end], number) for begin, end, number in line_index(path).tolist()]
    assert found == [(line, n) for n, line in enumerate(content.split(b"\n"), 1) if line not in (b"", b"\r")]


def test_the_index_is_kept_and_made_anew_when_the_file_changes(write_jsonl, tmp_path):
    path, cache = write_jsonl([{"text": "a"}, {"text": "b"}]), tmp_path / "cache"
    assert texts(JsonlSource(path, cache_dir=cache)) == ["a", "b"]
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert texts(JsonlSource(path, cache_dir=cache)) == ["a", "b"]
    assert file.stat().st_mtime_ns == written
    write_jsonl([{"text": "longer"}, {"text": "b"}, {"text": "c"}])
    assert texts(JsonlSource(path, cache_dir=cache)) == ["longer", "b", "c"]


def test_sources_pickle_small(write_jsonl, tmp_path):
    documents = [{"text": f"text {i}"} for i in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(documents), tmp_path / "data.parquet")
    jsonl, parquet = open_source(write_jsonl(documents)), open_source(tmp_path / "data.parquet")
    directory = write_tfds((jsonl[i] for i in range(len(jsonl))), tmp_path / "tfds")
    for source in (jsonl, parquet, open_source(directory)):
        pickled = pickle.dumps(source)
        assert len(pickled) < 20_000
        assert texts(pickle.loads(pickled)) == texts(source)


def test_a_line_longer_than_any_document_is_refused(write_jsonl, monkeypatch):
    monkeypatch.setattr("l4jax.data.sources.MAX_LINE_BYTES", 20)
    source = open_source(write_jsonl([{"text": "short"}, {"text": "a little longer"}]))
    assert source[0].content[0]["text"] == "short"
    with pytest.raises(DocumentError, match=r"data.jsonl:2: a line of 27 bytes, more than 20, is no document"):
        source[1]


# --- Parquet --------------------------------------------------------------------------------------------------------


def test_parquet_gives_what_jsonl_gives(many_documents, tmp_path):
    lines = [json.loads(line) for line in many_documents.read_text().splitlines()]
    columns = {name: [line.get(name) for line in lines] for name in ("text", "content", "messages", "lang")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet", row_group_size=7)
    parquet, jsonl = ParquetSource(tmp_path / "data.parquet"), JsonlSource(many_documents)
    assert len(parquet) == len(jsonl)
    for index in (59, 0, 13, 14, 7, 6, 58):  # over the edges of row groups, back and forth
        one, other = parquet[index], jsonl[index]
        assert (one.content, one.messages, one.lang) == (other.content, other.messages, other.lang)
        assert one.where == f"{tmp_path / 'data.parquet'}:row {index + 1}"


def test_parquet_may_hold_pictures_as_bytes(tmp_path, write_picture):
    content = (tmp_path / write_picture("a.png")).read_bytes()
    rows = [{"content": [{"type": "image", "bytes": content, "text": None}, {"type": "text", "text": "noise"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert ParquetSource(tmp_path / "data.parquet")[0].content[0] == {"type": "image", "image": content}


def test_damaged_parquet_is_one_clear_line(tmp_path):
    table = pyarrow.Table.from_pylist([{"text": "x" * 1000 + str(i)} for i in range(100)])
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet", compression="none", use_dictionary=False)
    content = bytearray((tmp_path / "data.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"cut.parquet is damaged or no Parquet file"):
        open_source(tmp_path / "cut.parquet")
    content[4:40] = bytes(36)  # the header of the first page
    (tmp_path / "data.parquet").write_bytes(content)
    with pytest.raises(DocumentError, match=r"data.parquet:row 1: the file is damaged"):
        open_source(tmp_path / "data.parquet")[0]


def test_row_groups_too_heavy_for_random_reading_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("l4jax.data.sources.HEAVY_ROW_GROUP", 1000)
    table = pyarrow.Table.from_pylist([{"text": os.urandom(500).hex()} for _ in range(40)])
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet", row_group_size=10)
    with pytest.warns(UserWarning, match=r"row groups of .* MiB"):
        open_source(tmp_path / "data.parquet")


# --- TFDS -----------------------------------------------------------------------------------------------------------


def test_written_documents_are_read_by_tfds_and_by_us(many_documents, tmp_path):
    source = JsonlSource(many_documents)
    directory = write_tfds((source[i] for i in range(len(source))), tmp_path / "tfds")
    examples = tfds.builder_from_directory(directory).as_data_source("train")
    assert [json.loads(example["document"]) for example in examples] == [to_json(source[i]) for i in range(len(source))]
    again = open_source(tmp_path / "tfds")
    assert isinstance(again, TfdsSource)
    assert [to_json(again[i]) for i in range(len(again))] == [to_json(source[i]) for i in range(len(source))]
    assert texts(open_source(tmp_path / "tfds", split="train[:1]")) == [source[0].content[0]["text"]]
    assert "tensorflow" not in sys.modules
    with pytest.raises(FileExistsError, match="holds a TFDS data set already"):
        write_tfds([], tmp_path / "tfds")


class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set as others make it."""

    name, VERSION, code_path = "foreign", tfds.core.Version("1.0.0"), Path(__file__)

    def __init__(self, *, features, examples, **kwargs):
        self._features, self._examples = features, examples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(self._features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._examples)


def build_foreign(directory, features, examples):
    Foreign(features=features, examples=examples, data_dir=directory).download_and_prepare()
    return directory


def test_texts_of_another_tfds_data_set_are_documents(tmp_path):
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=3)}
    build_foreign(tmp_path, features, [{"text": "grüße", "label": 2}])
    document = open_source(tmp_path)[0]
    assert document.content == ({"type": "text", "text": "grüße"},)
    assert document.extra == {"label": 2}
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has train, test"):
        open_source(tmp_path, split="dev")


def test_other_features_are_named(tmp_path):
    build_foreign(tmp_path, {"label": tfds.features.ClassLabel(num_classes=3)}, [{"label": 2}])
    with pytest.raises(ValueError, match=r"has the features label; expected document .* or text"):
        open_source(tmp_path)


# --- Which kind -----------------------------------------------------------------------------------------------------


def test_a_directory_of_files_is_one_source_in_their_order(write_jsonl, tmp_path):
    write_jsonl([{"text": "c"}], "two.jsonl")
    write_jsonl([{"text": "a"}, {"text": "b"}], "one.jsonl")
    write_jsonl([], "none.jsonl")
    source = open_source(tmp_path)
    assert texts(source) == ["a", "b", "c"]
    assert source[2].where == f"{tmp_path / 'two.jsonl'}:1"


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*nowhere; give a JSONL or Parquet file"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no documents in .* \(found .txt\); expected"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt is neither .jsonl nor .parquet; its name"):
        open_source(tmp_path / "notes.txt")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(ValueError, match=r"data.jsonl.gz is neither .*; unpack it"):
        open_source(tmp_path / "data.jsonl.gz")
