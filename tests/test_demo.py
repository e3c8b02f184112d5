import re
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

import l4jax
from l4jax import report
from l4jax.cli import main
from l4jax.train.answers import ReadingScore
from l4jax.train.metrics import read_metrics

DIGITS = "data.sources.scenes.digits"
SMALL = [
    *("steps=4", "log_every=1", "data.rows=2"),
    *(f"{DIGITS}.train_scenes=40", f"{DIGITS}.warm_up_scenes=8", f"{DIGITS}.eval_scenes=8"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--fast", "--out", str(directory), *SMALL]) == 0
    return directory


@pytest.mark.slow
def test_demo_leaves_a_model_that_answers(run_dir):
    model = l4jax.load(run_dir / "model")
    question = [{"type": "image", "image": Image.new("L", (56, 28))}, {"type": "text", "text": "what is written?"}]
    answer = model.chat([{"role": "user", "content": question}], temperature=0, max_new_tokens=4)
    assert answer.completion_tokens > 0


@pytest.mark.slow
def test_report_is_complete_and_needs_nothing_else(run_dir):
    page = (run_dir / "report.html").read_text()
    for text in (
        "What it says",
        "How it sees",
        "How it learned",
        "layer 4",
        "what is the sum?",
        "support vector machine",
    ):
        assert text in page
    assert not re.search(r"""\b(?:src|href)\s*=\s*(?!["']?data:)|url\(|@import""", page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)


@pytest.mark.slow
def test_demo_goes_on_where_it_stopped_and_trains_nothing_twice(run_dir):
    before = read_metrics(run_dir / "metrics.jsonl")
    assert main(["demo", "--fast", "--out", str(run_dir), *SMALL]) == 0
    assert read_metrics(run_dir / "metrics.jsonl") == before
    assert [line["step"] for line in before] == [1, 2, 3, 4]


def test_unknown_setting_is_one_clear_line(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "run"), "optimizer.learning_rat=1"]) == 1
    error = capsys.readouterr().err
    assert error == "error: unknown key optimizer.learning_rat; did you mean optimizer.learning_rate?\n"
    assert not (tmp_path / "run").exists()


def test_scores_count_places_and_whole_answers():
    score = ReadingScore.of(["12", "3", "4567", "89"], ["12", "34", "4507", "8"])
    assert (score.digits, score.scenes) == (7 / 9, 1 / 4)


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 1300, [0, 500, 1000]), (3, 3, [3])]
)
def test_ticks_are_round(low, high, ticks):
    assert report.nice_ticks(low, high) == pytest.approx(ticks)


def test_load_colours_have_their_ends():
    assert report.load_colour(1) == "#ffffff"
    assert report.load_colour(3) == report.load_colour(8) != report.load_colour(2)
    assert report.load_colour(0) == report.ACCENT


def test_what_a_model_says_cannot_become_markup():
    answer = report.Answer("<b>?", "<script>", "1 & 2")
    card = report.scene_card(Image.new("L", (28, 28)), [answer])
    assert "<script>" not in card
    assert "1 &amp; 2" in card
