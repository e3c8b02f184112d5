from pathlib import Path

import pytest
import yaml

from l4jax.train.config import load_run_config, run_config_from_dict, run_config_to_dict

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_a_run_and_survives_the_round_trip(path):
    config = load_run_config(path)
    assert run_config_from_dict(yaml.safe_load(yaml.safe_dump(run_config_to_dict(config)))) == config


def test_command_line_comes_before_the_file():
    words = ["steps=7", "optimizer.learning_rate=1e-3", "data.sources.scenes.digits.blank_images=true"]
    config = load_run_config(DEMO, words)
    assert (config.steps, config.optimizer.learning_rate) == (7, 1e-3)
    assert config.data.sources["scenes"].digits.blank_images


def test_model_settings_can_be_overridden():
    assert (
        load_run_config(DEMO, ["model.text_config.attention_chunk_size=48"]).model.text_config.attention_chunk_size
        == 48
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.learning_rate=1", "unknown key optimiser; did you mean optimizer?"),
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat; did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ("model.text_config.hiden_size=1", "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ("steps=many", "steps='many' is a str, expected int"),
        ("steps=0", "steps=0 must be at least 1"),
        ("steps", "'steps' is no setting; write key=value"),
        ("seed.x=1", "seed is a single value"),
        ("optimizer=3", "optimizer: expected settings inside"),
        ("xyz=1", "unknown key xyz; known keys here are model, data, optimizer"),
        (
            "data.sources.scenes.wieght=1",
            "unknown key data.sources.scenes.wieght; did you mean data.sources.scenes.weight?",
        ),
        ("data.num_worker=1", "unknown key data.num_worker; did you mean data.num_workers?"),
        ("data.weight=1", "unknown key data.weight; did you mean data.sources.NAME.weight?"),
        ("data.sources.scenes=3", "data.sources.scenes: expected settings inside"),
        ("data.sources=[1]", r"data.sources: expected settings by name, got \[1\]"),
        ("data.sources={}", "data.sources is no mixture: it names nothing; name a source"),
        ("data.sources.scenes.weight=0", "data.sources is no mixture: every weight is 0"),
        ("data.sources.scenes.weight=-1", "data.sources.scenes.weight=-1.0 must be 0 or more"),
        ("data.sources.more.weight=1", "data.sources.more must have one of path, digits"),
        ("data.long_documents=cut", "data.long_documents='cut' must be one of error, split, drop"),
        ("data.rows=0", "data.rows=0 must be at least 1"),
        ("data.row_tiles=-1", "data.row_tiles=-1 must not be negative"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_run_config(DEMO, [override])


def test_missing_keys_are_named_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ValueError, match="missing key model, data, optimizer, steps"):
        load_run_config(path)


@pytest.mark.parametrize("content", ["", "- a\n", "a: [1\n"])
def test_files_that_are_no_settings_are_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_run_config(path)


def test_absent_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no config at nowhere\.yaml"):
        load_run_config("nowhere.yaml")
