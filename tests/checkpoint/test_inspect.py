"""`inspect`: from headers, without jax; damage and differences are found and named."""

import json
import subprocess
import sys

import numpy as np
import pytest

from l4jax.checkpoint import convert, inspect, manifest, store
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.train_store import TrainStore
from l4jax.config import preset
from tests.checkpoint.conftest import random_parameters


def report(capsys, *arguments) -> tuple[int, str]:
    import argparse

    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    code = inspect.run(parser.parse_args([str(argument) for argument in arguments]))
    return code, capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path):
    config = preset("small-maverick")
    return store.save(tmp_path / "checkpoint", random_parameters(config), config)


def test_no_jax_is_imported(checkpoint):
    program = (
        "import argparse, sys; from l4jax.checkpoint import inspect; p = argparse.ArgumentParser();"
        "inspect.add_arguments(p); inspect.run(p.parse_args(sys.argv[1:])); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, checkpoint, "--verify"], check=True)


@pytest.mark.parametrize(
    ("name", "active"), [("scout", 17_172_894_720), ("maverick", 17_184_691_200), ("guard-4", 11_129_164_800)]
)
def test_active_parameters_are_the_published_ones(name, active):
    assert inspect.active_parameters(preset(name)) == active


def test_every_format_gives_the_same_tree(checkpoint, tmp_path, capsys):
    hf = convert.convert(checkpoint, tmp_path / "hf", to="hf")
    reports = [json.loads(report(capsys, path, "--json", "--tree")[1]) for path in (checkpoint, hf)]
    assert reports[0]["tree"] == reports[1]["tree"]
    assert reports[0]["parameters"] == sum(np.prod(entry["shape"]) for entry in reports[0]["tree"])
    assert report(capsys, hf, "--diff", checkpoint) == (0, report(capsys, hf, "--diff", checkpoint)[1])


def test_one_file_and_training_checkpoints_are_listed(checkpoint, tmp_path, capsys):
    hf = convert.convert(checkpoint, tmp_path / "hf", to="hf")
    code, text = report(capsys, hf / "model.safetensors", "--tree")
    assert code == 0
    assert "language_model.lm_head.weight" in text
    with TrainStore(tmp_path / "run") as run:
        run.save(3, {"params": {"w": np.zeros((2, 3), np.float32)}})
    code, text = report(capsys, tmp_path / "run", "--tree")
    assert code == 0
    assert "params.w" in text
    assert "2x3" in text


def test_any_flipped_bit_is_found_and_named(checkpoint, capsys):
    rng = np.random.default_rng(0)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != manifest.MANIFEST]
    assert report(capsys, checkpoint, "--verify")[0] == 0
    for path in rng.choice(files, 12, replace=False):
        data = bytearray(path.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        before = path.read_bytes()
        path.write_bytes(data)
        code, text = report(capsys, checkpoint, "--verify")
        path.write_bytes(before)
        assert code == 1
        assert path.relative_to(checkpoint).as_posix() in text


def test_missing_and_foreign_files_are_named(checkpoint, capsys):
    (checkpoint / "params" / "norm.scale" / "c" / "0").unlink()
    (checkpoint / "evil.bin").write_bytes(b"?")
    code, text = report(capsys, checkpoint, "--verify")
    assert code == 1
    assert "norm.scale/c/0 is missing" in text
    assert "evil.bin is not in the manifest" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_infinite_values_are_counted(tmp_path, capsys, dtype):
    config = preset("small-guard")
    params = random_parameters(config)
    params["norm.scale"][:3] = np.nan
    params["lm_head.kernel"][0, :2] = -np.inf
    directory = store.save(tmp_path / "checkpoint", params, config, dtype=dtype)
    code, text = report(capsys, directory, "--verify", "--json")
    assert code == 1
    expected = {"norm.scale": {"nan": 3, "inf": 0}, "lm_head.kernel": {"nan": 0, "inf": 2}}
    assert json.loads(text)["non_finite"] == expected


def test_a_difference_is_measured(checkpoint, tmp_path, capsys):
    config = preset("small-maverick")
    params = random_parameters(config)
    params["norm.scale"][4] += 0.5
    other = store.save(tmp_path / "other", params, config)
    code, text = report(capsys, checkpoint, "--diff", other)
    assert code == 1
    assert "norm.scale: 1 of 64 values differ, by at most 0.5" in text
    assert len(inspect.difference(open_checkpoint(checkpoint), open_checkpoint(other))) == 1
