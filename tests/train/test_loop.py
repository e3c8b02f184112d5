import dataclasses
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from l4jax.cli import USER_ERRORS
from l4jax.train import loop
from l4jax.train.config import load_run_config
from l4jax.train.data import RunData
from l4jax.train.metrics import read_metrics
from l4jax.train.run_directory import alone_in

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TINY = [
    *(
        "steps=8",
        "log_every=2",
        "save_every=100",
        "data.sources.scenes.digits.train_scenes=24",
        "data.sources.scenes.digits.eval_scenes=4",
        "data.sources.scenes.digits.warm_up_scenes=6",
    ),
    *(
        "data.rows=2",
        "optimizer.warmup_steps=2",
        "model.text_config.hidden_size=64",
        "model.text_config.num_hidden_layers=2",
    ),
    *("model.text_config.no_rope_layers=[1,0]", "model.text_config.num_local_experts=2"),
    *("model.vision_config.num_hidden_layers=1", "model.vision_config.hidden_size=48"),
]


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Every run compiles the same step; the runs here share one."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = load_run_config(DEMO, TINY)
    return config, RunData(config, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run without interruption: its directory and its result."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(data, directory)


def run(data, directory, *, config=None, **options):
    return loop.train(config or data[0], data[1], directory, console=Console(quiet=True), **options)


@pytest.mark.parametrize("mesh", ["expert=2", "fsdp=2,tensor=2"])
def test_goes_on_on_another_mesh_with_the_same_loss(monkeypatch, data, whole, tmp_path, mesh):
    stop_at(monkeypatch, 3, signal.SIGTERM)
    assert run(data, tmp_path / "run").steps == 3
    monkeypatch.undo()
    elsewhere = load_run_config(DEMO, [*TINY, f"parallel.mesh={mesh}", "parallel.remat=full"])
    assert run(data, tmp_path / "run", config=elsewhere).steps == 8
    here, there = (read_metrics(path / "metrics.jsonl") for path in (whole[0], tmp_path / "run"))
    assert [line["step"] for line in there] == [2, 4, 6, 8]
    # Sums in another order; Adam makes more of it with every step.
    np.testing.assert_allclose([x["loss"] for x in there[-2:]], [x["loss"] for x in here[-2:]], rtol=1e-4)


def stop_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal while step `step` runs."""
    make = loop.make_train_step

    def make_and_count(*args, **options):
        train_step, taken = make(*args, **options), iter(range(1, 10**6))

        def counted(*inputs):
            if next(taken) == step:
                os.kill(os.getpid(), number)
            return train_step(*inputs)

        return counted

    monkeypatch.setattr(loop, "make_train_step", make_and_count)


def assert_same_state(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(data, whole, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        stopped = run(data, tmp_path)
    assert (stopped.steps, stopped.interrupted_by) == (3, number)

    finished = run(data, tmp_path, resume="must")
    assert (finished.steps, finished.interrupted_by) == (8, None)
    assert_same_state(finished, whole[1])
    losses = [[line["loss"] for line in read_metrics(path / "metrics.jsonl")] for path in (whole[0], tmp_path)]
    assert losses[0][-2:] == losses[1][-2:]


def test_a_signal_while_a_checkpoint_is_still_being_written_costs_nothing(data, whole, tmp_path, monkeypatch):
    often = load_run_config(DEMO, [*TINY, "save_every=2"])
    write = ocp.CheckpointManager.save

    def slowly(self, *args, **options):
        """The write goes on in the background when this returns; the signal comes before it can end."""
        result = write(self, *args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", slowly)
        stopped = run(data, tmp_path, config=often)
    assert (stopped.steps, stopped.interrupted_by) == (2, signal.SIGTERM)
    assert_same_state(run(data, tmp_path, resume="must"), whole[1])


def test_the_end_of_a_run_is_not_trained_again(data, whole):
    directory, first = whole
    again = run(data, directory)
    assert again.steps == 8
    assert_same_state(again, first)
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [2, 4, 6, 8]


def test_never_starts_anew(data, whole, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(whole[0], directory)
    again = run(data, directory, resume="never")
    assert_same_state(again, whole[1])
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [2, 4, 6, 8]


def test_other_settings_in_the_same_directory_are_refused(data, whole):
    other = load_run_config(DEMO, [*TINY, "optimizer.learning_rate=0.5"])
    with pytest.raises(ValueError, match=r"other settings \(optimizer.learning_rate: 0.0015 there, 0.5 here\)"):
        run(data, whole[0], config=other)


def test_must_needs_a_checkpoint(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(data, tmp_path, resume="must")


def break_step(monkeypatch, step: int) -> None:
    """Makes the gradient of one step infinite."""
    make = loop.make_stage

    def make_broken(*args):
        stage = make(*args)

        def objective(params, rows, fixed, router_bias, at):
            loss, numbers = stage.objective(params, rows, fixed, router_bias, at)
            return loss * jnp.where(at == step - 1, jnp.inf, 1.0), numbers

        return dataclasses.replace(stage, objective=objective)

    monkeypatch.setattr(loop, "make_stage", make_broken)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(data, tmp_path, monkeypatch):
    break_step(monkeypatch, 3)
    with pytest.raises(ValueError, match=r"step 3 gave a loss of inf .*bad-batch-3-0.npz.*on_nan=skip"):
        run(data, tmp_path)
    third = next(itertools.islice(data[1].training_batches(), 2, None))
    with np.load(tmp_path / "bad-batch-3-0.npz") as saved:
        np.testing.assert_array_equal(saved["ids"], third["ids"])


def test_a_loss_that_is_no_number_can_be_skipped(data, tmp_path, monkeypatch):
    break_step(monkeypatch, 3)
    settings = load_run_config(DEMO, [*TINY, "on_nan=skip", "log_every=1"])
    trained = run(data, tmp_path, config=settings)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, False, True, *[False] * 5]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.state))


def test_two_runs_in_one_directory_are_refused(data, tmp_path):
    with alone_in(tmp_path), pytest.raises(ValueError, match="another process trains in"):
        run(data, tmp_path)


def test_loss_falls_and_every_expert_load_is_counted(data, whole):
    _, source = data
    lines = read_metrics(whole[0] / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    steps = zip(range(2), source.training_batches(), strict=False)  # a line is two steps; padding goes to nobody
    tokens = sum(int((batch["segment_ids"] > 0).sum()) for _, batch in steps)
    assert [sum(layer) for layer in lines[0]["router_load"]] == [tokens, tokens]


def test_a_run_goes_on_with_another_mixture_but_not_with_other_files(data, tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"text number {i}"}) for i in range(20)]
    for name in ("texts", "others"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def mixed(*words):
        config = load_run_config(DEMO, [*TINY, f"data.sources.texts.path={tmp_path / 'texts.jsonl'}", *words])
        return config, RunData(config, tmp_path / "data")

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        assert run(mixed(), run_dir).steps == 3
    with pytest.raises(ValueError, match=r"other settings \(data.sources.texts.path: .*texts.jsonl there, .*others"):
        run(mixed(f"data.sources.texts.path={tmp_path / 'others.jsonl'}"), run_dir)
    new = f"data.sources.new.path={tmp_path / 'others.jsonl'}"
    assert run(mixed("data.sources.texts.weight=5", "data.skip_malformed=true", new), run_dir, resume="must").steps == 8


def test_a_full_disk_costs_no_checkpoint(data, whole, mount, monkeypatch):
    disk = mount("size=64m")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        run(data, disk / "run")
    used = shutil.disk_usage(disk).used // 1024
    mount(f"size={used + 64}k")
    with pytest.raises(Exception, match=r"No space left on device|RESOURCE_EXHAUSTED") as raised:
        run(data, disk / "run")
    assert isinstance(raised.value, USER_ERRORS)  # one line, no traceback
    mount("size=64m")
    finished = run(data, disk / "run", resume="must")
    assert_same_state(finished, whole[1])
