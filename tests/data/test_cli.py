import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from l4jax.cli import main
from l4jax.data.config import DataConfig, SourceConfig
from l4jax.data.encode import Encoder
from l4jax.data.sources import open_source
from l4jax.data.survey import Span, histogram, spans, survey

SMALL = """
seed: 0
data:
  sources: {{docs: {{path: {path}}}}}
  rows: 2
  row_tokens: 60
  row_tiles: 8
model:
  image_token_index: 271
  boi_token_index: 266
  eoi_token_index: 267
  text_config: {{vocab_size: 272, hidden_size: 32, intermediate_size: 32, intermediate_size_mlp: 32,
    num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, head_dim: 16, num_local_experts: 2}}
  vision_config: {{hidden_size: 32, image_size: 28, patch_size: 7, num_hidden_layers: 1, num_attention_heads: 2,
    intermediate_size: 32, projector_input_dim: 32, projector_output_dim: 32, vision_output_dim: 32}}
"""


@pytest.fixture
def write_config(tmp_path):
    def write(path, text=SMALL):
        (tmp_path / "run.yaml").write_text(text.format(path=path))
        return str(tmp_path / "run.yaml")

    return write


def run(capsys, *arguments):
    code = main(["data", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def numbers(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def test_numbers_are_those_of_the_documents(capsys, many_documents, write_config, processor):
    code, found = numbers(capsys, write_config(many_documents), "data.row_tokens=160")
    source, encoder = open_source(many_documents), Encoder(processor, 10_000, 100)
    examples = [encoder.encode(source[i]) for i in range(len(source))]
    assert code == 0
    assert found["sources"]["docs"] == {
        "documents": 60,
        "read": 60,
        "weight": 1.0,
        "tokens": sum(len(example.ids) for example in examples),
        "learned_tokens": sum(int(example.loss_mask.sum()) for example in examples),
        "tiles": sum(len(example.tiles) for example in examples),
        "malformed": 0,
        "malformed_first": [],
        "too_long": 0,
        "too_long_first": [],
    }
    assert found["documents_by_lang"] == {"en": 15, "de": 15, "(none)": 30}
    assert found["documents_by_capability"] == {"(none)": 45, "vqa": 15}
    assert found["tokens_by_source"]["made"] == sum(len(example.ids) for example in examples[::4])
    assert found["tiles_histogram"] == {"0": 15, "1": 0, "2+": 30, "4+": 15}
    assert sum(found["tokens_histogram"].values()) == 60
    assert 0.8 < found["fill"] <= 1


def test_histogram_bins_are_powers_of_two():
    assert histogram(np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 5000])) == [
        *(("0", 1), ("1", 1), ("2+", 2), ("4+", 2), ("8+", 1)),
        *((name, 0) for name in ("16+", "32+", "64+", "128+", "256+")),
        *(("512+", 1), ("1k+", 1), ("2k+", 0), ("4k+", 1)),
    ]
    assert histogram(np.array([], int)) == []


def test_limit_looks_at_documents_from_all_over(capsys, write_jsonl):
    path = write_jsonl([{"text": "x", "source": f"s{i // 10}"} for i in range(100)])
    _, found = numbers(capsys, path, "--limit", 10)
    assert found["sources"]["data.jsonl"]["documents"] == 100
    assert found["documents_by_source"] == {f"s{i}": 1 for i in range(10)}


def test_what_cannot_be_read_is_named_and_fails(capsys, write_jsonl):
    lines = [{"text": "good"}, "{", {"text": "good"}, *[{"text": ""}] * 12]
    path = write_jsonl(lines)
    code, _, error = run(capsys, path)
    assert code == 1
    assert f"  {path}:2: not JSON" in error
    assert f"  {path}:4: it is empty" in error
    assert "  and 3 more\n" in error
    assert error.endswith(
        "error: 13 of 15 documents cannot be read; mend them, or leave them out with --skip-malformed\n"
    )
    code, found = numbers(capsys, path, "--skip-malformed")
    assert code == 0
    assert found["sources"]["data.jsonl"]["malformed"] == 13


def test_documents_that_stop_a_run_are_named(capsys, write_config, many_documents):
    code, _, error = run(capsys, write_config(many_documents))
    assert code == 1
    assert re.search(r"data.jsonl:\d+: it has \d+ tokens, a row has room for data.row_tokens=60; raise it", error)
    assert "of 60 documents do not fit into a row" in error
    assert run(capsys, write_config(many_documents), "data.long_documents=drop")[0] == 0


def test_terminal_output_shows_what_the_model_sees(capsys, write_config, many_documents):
    code, out, _ = run(capsys, write_config(many_documents), "data.long_documents=split", "data.row_tokens=160")
    assert code == 0
    text = out.replace("\n", "")
    for piece in ("<|image_start|>[tile:1]<|tile_x_separator|>[tile:2]", "packed into rows of 160 tokens", "vqa"):
        assert piece in text
    assert out.count("of them learned") == 5


def test_examples_are_of_each_kind_however_rare(write_jsonl, write_picture, processor, tmp_path):
    picture = {"type": "image", "path": write_picture("a.png")}
    rare = [
        {"content": [picture, {"type": "text", "text": "seen"}]},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
        {"text": "1+1=2", "capability": "arithmetic"},
    ]
    path = write_jsonl([*rare, *({"text": "x" * i} for i in range(1, 90))])
    data = DataConfig(sources={"docs": SourceConfig(path=str(path))}, rows=1, row_tokens=100, row_tiles=1)
    found = survey(data, processor, seed=0, directory=tmp_path)
    shown = [int(title.rpartition(":")[2]) for title, _ in found.examples]
    assert {1, 2, 3} < set(shown)
    assert len(set(shown)) == 5


def test_the_page_is_complete_and_needs_nothing_else(capsys, tmp_path, write_jsonl, write_picture):
    write_picture("a.png", (400, 100))
    path = write_jsonl(
        [{"content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "<script>x</script>"}]}, {"text": 1}]
    )
    run(capsys, path, "--html", tmp_path / "page.html", "data.row_tokens=1000")
    page = (tmp_path / "page.html").read_text()
    for piece in (
        "How much there is",
        "How it is packed",
        "As the model sees it",
        "What is wrong",
        "3 whole",
        "data:image",
    ):
        assert piece in page
    assert "<script>" not in page
    assert not re.search(r"""\b(?:src|href)\s*=\s*(?!["']?data:)|url\(|@import""", page)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_spans_name_what_each_token_is(processor):
    from PIL import Image

    content = [{"type": "image", "image": Image.new("L", (28, 56))}, {"type": "text", "text": "né"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
    encoded = processor.encode(messages, add_generation_prompt=False)
    from l4jax.data.encode import Example, to_levels

    found = list(spans(Example(encoded.ids, encoded.answer_mask, to_levels(encoded)), processor))
    assert sum(span.tokens for span in found) == len(encoded.ids)
    assert [span.text for span in found if span.kind == "tile"] == ["1", "2", "3 whole"]
    assert [span for span in found if span.learned] == [
        Span("text", "ok", 2, True),
        Span("control", "<|eot|>", 1, True),
    ]
    assert Span("text", "né", 3, False) in found


def test_written_documents_can_be_looked_at(capsys, many_documents, tmp_path):
    code, out, _ = run(capsys, many_documents, "--write", tmp_path / "tfds")
    assert (code, out.rpartition(": ")[2]) == (0, "60 documents\n")
    before, after = (numbers(capsys, path)[1] for path in (many_documents, tmp_path / "tfds"))
    assert before["tokens_histogram"] == after["tokens_histogram"]
    assert before["tokens_by_lang"] == after["tokens_by_lang"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "no data at nowhere.jsonl; give a JSONL or Parquet file"),
        (["nowhere.yaml"], "no config at nowhere.yaml"),
        (["configs/demo.yaml", "data.row=1"], "unknown key data.row; did you mean data.rows?"),
        (["configs/demo.yaml", "-m", "scout"], "a config names its model and tokenizer; leave -m out"),
        (["x.jsonl", "-m", "skout"], "no model skout: neither a directory nor a preset"),
        (["configs/demo.yaml", "--write", "x"], "--write takes one file or directory"),
        (["x.jsonl", "--limit", "0"], "--limit 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(capsys, arguments, message):
    code, out, error = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert error.startswith("error: ")
    assert message in error
