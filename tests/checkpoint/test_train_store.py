"""Training checkpoints: state, data position and facts come back; the newest and the best are kept."""

import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from l4jax.checkpoint.inspect import verify_files
from l4jax.checkpoint.train_store import Interruption, TrainStore

STATE = {"params": {"w": jnp.arange(8.0)}, "optimizer": {"m": jnp.ones(3)}, "step": jnp.int32(3)}


def batches():
    return iter(grain.MapDataset.range(100).shuffle(0).repeat().batch(4).to_iter_dataset())


def test_state_data_and_facts_come_back(tmp_path):
    data = batches()
    with TrainStore(tmp_path) as store:
        next(data)
        store.save(1, STATE, data, {"learning_rate": 0.5})
    upcoming, again = next(data), batches()
    with TrainStore(tmp_path) as store:
        state, step, extra = store.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, STATE), again)
    assert (step, extra) == (1, {"learning_rate": 0.5})
    np.testing.assert_array_equal(next(again), upcoming)
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


def test_the_newest_and_the_best_are_kept(tmp_path):
    with TrainStore(tmp_path, keep=2, best_metric="loss") as store:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.7]):
            store.save(step, STATE, metrics={"loss": loss})
        store.wait()
        assert store.all_steps() == [1, 3, 4]
        assert (store.latest_step(), store.best_step()) == (4, 1)


def test_an_unfinished_save_is_removed_and_not_taken(tmp_path):
    with TrainStore(tmp_path) as store:
        store.save(7, STATE)
    (tmp_path / "7").rename(tmp_path / "7.orbax-checkpoint-tmp")  # what a kill leaves
    (tmp_path / "7.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    with TrainStore(tmp_path) as store:
        assert store.latest_step() is None
        with pytest.raises(FileNotFoundError, match="no checkpoint of step"):
            store.restore(STATE)
        store.save(8, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["8"]


def test_damage_is_found(tmp_path):
    with TrainStore(tmp_path) as store:
        store.save(1, STATE)
    assert not verify_files(tmp_path / "1")
    file = max((path for path in (tmp_path / "1" / "state").rglob("*") if path.is_file()), key=os.path.getsize)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify_files(tmp_path / "1") == [f"{file.relative_to(tmp_path / '1')} was changed: its sha256 differs"]
    file.unlink()
    with TrainStore(tmp_path) as store, pytest.raises(ValueError, match="is missing"):
        store.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, STATE))


def test_signals_are_noted_until_the_step_is_saved(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with TrainStore(tmp_path) as store, Interruption() as stop:
        assert not stop.requested(store, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(store, 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_number_of_processes_is_one_clear_line(tmp_path):
    data = batches()
    with TrainStore(tmp_path) as store:
        store.save(1, STATE, data)
    (place,) = (tmp_path / "1" / "data").glob("process_*")
    place.rename(place.with_name("process_0-of-4.json"))
    (tmp_path / "1" / "manifest.json").unlink()
    with (
        TrainStore(tmp_path) as store,
        pytest.raises(ValueError, match=r"was saved by 4 processes, here there are 1; .* go on with 4"),
    ):
        store.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, STATE), data)
