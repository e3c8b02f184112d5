import json

import numpy as np
import pytest

from l4jax.config import PRESETS
from l4jax.data.balance import Entries, caption_of, kept
from l4jax.data.config import BalanceConfig, DataConfig, SourceConfig
from l4jax.data.schema import parse_document
from l4jax.data.streams import make_batches, make_processor


def test_entries_stand_at_word_boundaries_whatever_the_case():
    entries = Entries(["cat", "Great Dane", "", "new york city"])
    assert entries.found_in("A Great, dane and a catalogue") == {("great", "dane")}
    assert entries.found_in("CAT in New York City: cat") == {("cat",), ("new", "york", "city")}


def test_common_entries_are_thinned_and_rare_ones_kept():
    captions = ["a cat"] * 4000 + ["an axolotl"] * 30 + ["nothing known"] * 50 + [None]
    chosen = kept(captions, Entries(["cat", "axolotl"]), most=100, seed=0)
    assert (np.asarray(chosen) < 4000).sum() == pytest.approx(100, abs=35)  # three and a half standard deviations
    assert set(range(4000, 4030)) <= set(chosen.tolist())
    assert chosen.max() < 4030
    np.testing.assert_array_equal(chosen, kept(captions, Entries(["cat", "axolotl"]), most=100, seed=0))


def test_a_caption_with_a_rare_entry_is_kept_whatever_else_it_has():
    captions = ["cat"] * 1000 + ["cat and axolotl"]
    assert 1000 in kept(captions, Entries(["cat", "axolotl"]), most=5, seed=3)


def test_captions_of_documents_and_of_conversations():
    assert caption_of(parse_document({"text": "a cat"}, "x:1")) == "a cat"
    messages = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": [{"type": "text", "text": "cat"}]},
    ]
    assert caption_of(parse_document({"messages": messages}, "x:1")) == "what? cat"


def test_a_source_of_a_mixture_is_balanced(tmp_path):
    lines = [json.dumps({"text": "the cat"})] * 400 + [json.dumps({"text": "a newt"})] * 20
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    (tmp_path / "entries.txt").write_text("cat\nnewt\n")
    model = PRESETS["small-scout"]
    balance = BalanceConfig(entries=str(tmp_path / "entries.txt"), most=20)
    source = SourceConfig(path=str(tmp_path / "web.jsonl"), balance=balance)
    config = DataConfig(sources={"web": source}, rows=2, row_tokens=64)
    batches = make_batches(config, make_processor(config, model), 0, tmp_path)
    assert batches.streams["web"].length == pytest.approx(40, abs=15)
    (tmp_path / "entries.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"data.sources.web: no document has an entry of .*entries.txt"):
        make_batches(config, make_processor(config, model), 0, tmp_path)
