"""Stages through the loop: one leaves what the next begins with."""

import jax
import numpy as np
import pytest
from rich.console import Console

import l4jax
from l4jax.checkpoint.load import load
from l4jax.train import loop, stage
from l4jax.train.config import load_run_config
from l4jax.train.data import RunData
from l4jax.train.export import export
from l4jax.train.metrics import read_metrics
from l4jax.train.state import path_name
from tests.train.test_loop import _compile_once  # noqa: F401, used by every test here

CAPTIONING = "configs/experiments/captioning.yaml"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The run of the captioning experiment, as small as it goes."""
    import yaml

    path = tmp_path_factory.mktemp("settings") / "run.yaml"
    with open(CAPTIONING) as file:
        path.write_text(yaml.safe_dump(yaml.safe_load(file)["run"]))
    small = ["steps=4", "log_every=2", "data.rows=2", "evaluate.held_out.max_batches=2"]

    def make(*words):
        return load_run_config(path, [*small, *words])

    return make


def train(config, directory):
    data = RunData(config, directory / "data")
    trained = loop.train(config, data, directory, console=Console(quiet=True))
    export(trained.model(), data.processor.tokenizer, directory / "model")
    return trained


@pytest.fixture(scope="module")
def llama(settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return directory, train(settings(), directory)


def test_an_evaluation_is_written_and_the_model_is_one_that_loads(llama):
    directory, _ = llama
    (line,) = read_metrics(directory / "evaluations.jsonl")
    assert line["step"] == 4
    assert 0 <= line["held_out"]["exact"] <= 1
    assert line["held_out"]["documents"] > 0
    last = read_metrics(directory / "metrics.jsonl")[-1]
    assert last["loss_by_source"].keys() == {"captions"}
    assert last["loss_by_modality"].keys() == {"pictures"}
    assert {"grad_norms", "update_ratios", "router_entropy", "load_imbalance", "tokens_per_second"} <= last.keys()
    model = l4jax.load(directory / "model")
    assert model.generate("a handwritten", max_new_tokens=2, temperature=0).completion_tokens > 0


@pytest.fixture(scope="module")
def contrasted(settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("contrasted")
    config = settings("contrastive={width: 16, pairs_per_row: 4}", "steps=12", "log_every=6")
    return directory, train(config, directory)


def test_pictures_and_captions_find_each_other(contrasted):
    first, last = read_metrics(contrasted[0] / "metrics.jsonl")
    assert last["loss"] < first["loss"]


def test_the_encoder_learns_beside_a_llama_whose_bytes_do_not_change(settings, llama, contrasted, tmp_path):
    vision = "vision_model|multi_modal_projector"
    config = settings(
        f"init={{llama: {{path: {llama[0] / 'model'}}}, encoder: {{path: {contrasted[0] / 'model'}, "
        "include: vision_model}}",
        f"trainable={vision}",
    )
    trained = train(config, tmp_path)
    before, encoder = (nested(run.model()) for run in (llama[1], contrasted[1]))
    for path, after in nested(trained.model()).items():
        if path.startswith(("vision_model", "multi_modal_projector")):
            start = encoder if path.startswith("vision_model") else before
            assert not np.array_equal(after, start[path]), path
            assert np.abs(after - start[path]).max() < 0.05, path  # it began there
        else:
            np.testing.assert_array_equal(after, before[path], err_msg=path)
    abstract = {"lm_head.kernel": jax.ShapeDtypeStruct((64, 272), np.float32)}
    saved = [load(directory / "model", abstract)["lm_head.kernel"] for directory in (llama[0], tmp_path)]
    np.testing.assert_array_equal(*saved)


def nested(model):
    from flax import nnx

    params = nnx.to_pure_dict(nnx.state(model))
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


def test_a_student_learns_from_the_model_of_a_run(settings, llama, tmp_path):
    train(settings(f"distill.teacher={llama[0] / 'model'}", "model.text_config.num_hidden_layers=1",
                   "model.text_config.no_rope_layers=[0]", "steps=2"), tmp_path)  # fmt: skip
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert 0 < line["soft_weight"] < 1
    assert line["soft_loss"] > 0


def test_a_teacher_whose_targets_are_kept_speaks_once(settings, llama, tmp_path, monkeypatch):
    words = [f"distill.teacher={llama[0] / 'model'}", "distill.top_k=4", "steps=3", "log_every=1"]
    cached = [*words, f"distill.cache={tmp_path / 'cache'}"]
    live, first = (train(settings(*some), tmp_path / name) for some, name in ((words, "live"), (cached, "first")))
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 6  # rows of three steps
    monkeypatch.setattr(stage, "load", lambda *_: pytest.fail("the teacher was loaded"))
    again = train(settings(*cached), tmp_path / "again")
    for other in (first, again):
        for path, leaf in nested(other.model()).items():
            np.testing.assert_allclose(leaf, nested(live.model())[path], rtol=1e-5, atol=1e-6, err_msg=path)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("live", "first", "again")]
    for line, *others in zip(*lines, strict=True):
        for name in ("loss", "soft_loss", "soft_weight", "teacher_loss"):
            np.testing.assert_allclose([other[name] for other in others], line[name], rtol=1e-5)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{files[0].name} is damaged .*; remove it"):
        train(settings(*cached), tmp_path / "damaged")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.teacher=x", "distill.cache=y"], "distill.cache needs distill.top_k"),
        (["init.llama.path=nowhere"], "nowhere is not a directory"),
        (["distill.teacher=nowhere"], "nowhere is not a directory"),
        (["trainable=vision_modell"], "matches no parameter"),
        (["contrastive.width=8", "distill.teacher=x"], "two objectives"),
        (["contrastive.width=8", "parallel.microbatches=2"], "microbatches must be 1"),
        (["metap={base_width: 32, base_depth: 2, base_head_dim: 16}", "optimizer.name=muon"], "must be adamw"),
        (["metap={base_width: 32, base_depth: 2}"], "base_head_dim=128 and the model's 16 differ"),
    ],
)
def test_what_cannot_be_is_said(settings, tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings(*words), tmp_path)
