import json
import math

import pytest
import yaml

from l4jax import sweep
from l4jax.cli import main
from l4jax.sweep.config import Expectation, Variant, load_sweep, run_directory
from l4jax.sweep.results import best_rate, collect

CAPTIONING = "configs/experiments/captioning.yaml"


@pytest.fixture
def path(tmp_path):
    """A sweep of a small run over two learning rates, whose second arm begins with what the first leaves."""
    with open(CAPTIONING) as file:
        content = yaml.safe_load(file)
    content |= {
        "metrics": {"exact": "held_out.exact", "loss": "metrics.loss"},
        "arms": {"first": [], "second": ["init={start: {path: '{first}/model'}}"]},
        "seeds": [3, 4],
        "expect": ["min exact of first >= 0.5", "mean loss of second <= 0.5 * mean loss of first"],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def finished(monkeypatch):
    """Replaces training: every run leaves numbers that follow from its settings."""
    trained = []

    class Process:
        returncode = 0

        def poll(self):
            return 0

    def start(directory, cores):
        run = yaml.safe_load((directory / "run.yaml").read_text())
        trained.append(directory.name)
        octaves = math.log2(run["optimizer"]["learning_rate"] / 2e-3)
        loss = run["seed"] * (0.1 if run["init"] else 1.0) * (1 + octaves**2)
        (directory / "metrics.jsonl").write_text(json.dumps({"step": run["steps"], "loss": loss}) + "\n")
        evaluation = {"step": run["steps"], "held_out": {"exact": 0.4 + run["seed"] / 10}}
        (directory / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
        (directory / "model").mkdir(exist_ok=True)
        (directory / "model" / "config.json").write_text("{}")
        return Process()

    monkeypatch.setattr(sweep, "start", start)
    return trained


def test_every_arm_is_trained_with_every_seed_and_only_once(path, finished, tmp_path, capsys):
    for _ in range(2):
        assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--jobs", "2"]) == 0
    assert finished == ["first,seed=3", "first,seed=4", "second,seed=3", "second,seed=4"]
    shown = capsys.readouterr().out
    assert "holds: min exact of first >= 0.5 (0.700, 0.500)" in shown
    assert "holds: mean loss of second <= 0.5 * mean loss of first (0.350, 1.750)" in shown
    values = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert values["loss"] == {"first": [3.0, 4.0], "second": [pytest.approx(0.3), pytest.approx(0.4)]}
    assert "<table>" in (tmp_path / "out" / "sweep.html").read_text()


def test_what_does_not_come_fails(path, finished, tmp_path, capsys):
    words = ["expect=[min exact of first >= 0.9]"]
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), *words]) == 1
    assert "FAILS: min exact of first >= 0.9 (0.700, 0.900)" in capsys.readouterr().out


def test_a_later_arm_finds_the_run_of_an_earlier_one(path, tmp_path):
    wanted = load_sweep(path)
    config = wanted.settings(Variant("second", ()), 4, tmp_path)
    assert config.seed == 4
    assert config.init["start"].path == str(run_directory(tmp_path, Variant("first", ()), 4) / "model")


def test_a_grid_has_every_combination_and_the_best_of_each_arm(path, finished, tmp_path):
    wanted = load_sweep(path, ["grid={optimizer.learning_rate: [1.0e-3, 2.0e-3], data.rows: [2, 4]}"])
    names = [variant.name for variant in wanted.variants()]
    assert len(names) == 8
    assert names[0] == "first,learning_rate=0.001,rows=2"
    assert wanted.settings(list(wanted.variants())[3], 3, tmp_path).data.rows == 4
    from rich.console import Console

    sweep.train_all(wanted, list(wanted.variants()), tmp_path, 1, Console(quiet=True))
    results = collect(wanted, tmp_path)
    assert results.best(wanted, "second").arm == "second"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=3", "unknown key steps; did you mean"),
        ("goal=most", "goal='most' must be one of max, min"),
        ("arms={}", "arms names nothing"),
        ("expect=[first is better]", "does not read like `min exact of sees >= 0.85`"),
        ("expect=[min exact of third >= 1]", "names 'third', there is first, second"),
        ("run.optimizer.learning_rat=1", "unknown key optimizer.learning_rat; did you mean optimizer.learning_rate?"),
        ("grid={data.row: [1]}", "unknown key data.row; did you mean data.rows?"),
    ],
)
def test_mistakes_are_named_before_anything_runs(path, finished, tmp_path, capsys, word, message):
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), word]) == 1
    assert message in capsys.readouterr().err
    assert not finished


def test_a_metric_that_is_not_there_is_named(path, finished, tmp_path, capsys):
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "metrics.exact=held_out.exat"]) == 1
    assert "held_out.exat is not among the results; at 'exat' there is exact" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_own_words(path, tmp_path, capsys):
    words = [
        "run.data.sources={web: {path: missing.jsonl}}",
        "arms={first: []}",
        "seeds=[0]",
        "expect=[max exact of first >= 0]",
    ]
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), *words]) == 1
    assert "first,seed=0 failed: " in (message := capsys.readouterr().err)
    assert "missing.jsonl" in message


@pytest.mark.parametrize(
    ("text", "holds"),
    [("min a of x >= 1", True), ("max a of x <= 2", False), ("mean a of x >= 0.5 * median a of y", True)],
)
def test_expectations(text, holds):
    results = {"a": {"x": [1.0, 2.0, 3.0], "y": [4.0, 4.0, 9.0]}}
    assert Expectation.parse(text, ["x", "y"], ["a"]).check(results)[0] == holds


def test_the_best_rate_lies_between_the_points_of_the_grid():
    rates = [2.0**k for k in (-8, -7, -6, -5)]
    losses = [(k + 6.3) ** 2 for k in (-8, -7, -6, -5)]
    assert best_rate(rates, losses) == pytest.approx(2**-6.3)
    assert best_rate(rates[::-1], losses[::-1]) == pytest.approx(2**-6.3)
    assert best_rate(rates, [4, 3, 2, 1]) == rates[-1]


def test_the_best_rate_can_be_expected(path, finished, tmp_path, capsys):
    words = [
        "metrics={loss: metrics.loss}",
        "goal=min",
        "grid={optimizer.learning_rate: [0.6e-3, 1.2e-3, 2.4e-3, 4.8e-3]}",
    ]
    holds = ["mean best_rate of first <= 0.00201", "mean best_rate of first >= 0.00199"]
    fails = ["mean best_rate of second >= 1.1 * mean best_rate of first"]
    for expected, code in ((holds, 0), (fails, 1)):
        command = ["sweep", str(path), "--out", str(tmp_path / "out"), *words, f"expect={json.dumps(expected)}"]
        assert main(command) == code
    assert "by a parabola: first 0.002 (2^-8.97)" in capsys.readouterr().out
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), f"expect={json.dumps(holds)}"]) == 1
    assert "names 'best_rate', there is exact, loss" in capsys.readouterr().err


def test_settings_are_transferred(path, finished, tmp_path, capsys):
    words = [
        "arms={base: [metap.base_width=64, metap.base_depth=2, metap.base_head_dim=16]}",
        "grid={optimizer.learning_rate: [1.0e-3, 2.0e-3, 4.0e-3]}",
        "expect=[min exact of base >= 0]",
        "transfer=scout",
    ]
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), *words]) == 0
    shown = capsys.readouterr().out
    assert "scout, from base at 0.001" in shown
    assert "unembedding" in shown
    assert "1.25e-05" in shown  # of hidden matrices: 80 times wider
    words[1] = "grid={data.rows: [2, 4]}"
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), *words]) == 1
    assert "transfer is for a grid of optimizer.learning_rate alone" in capsys.readouterr().err
