"""`convert --quantize`: box by box the numbers that `quantize_model` makes of the whole, and they generate."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l4jax
from l4jax.checkpoint import convert, inspect, manifest, outputs, pieces, store, zarr
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.config import preset
from l4jax.model.params import flat_params
from l4jax.model.quant import SCHEMES, quantize_model
from l4jax.ops import QuantizedArray
from tests.checkpoint.conftest import random_parameters


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(zarr, "PIECE_BYTES", 32768)
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 4096)


@pytest.fixture
def checkpoint(tmp_path):
    """In bfloat16; experts are wide enough for groups of int4."""
    config = preset("small-maverick")
    text = dataclasses.replace(config.text_config, intermediate_size=256)
    config = dataclasses.replace(config, text_config=text)
    return store.save(tmp_path / "checkpoint", random_parameters(config), config, dtype="bfloat16")


def test_schemes_are_those_of_the_model():
    assert set(outputs.QUANTIZE) == set(SCHEMES)


@pytest.mark.parametrize("scheme", outputs.QUANTIZE)
def test_the_numbers_are_those_of_the_quantised_model(checkpoint, tmp_path, scheme):
    small = convert.convert(checkpoint, tmp_path / "small", quantize=scheme)
    loaded, whole = l4jax.load(small, max_len=64), l4jax.load(checkpoint, max_len=64)
    found, expected = flat_params(loaded.model), flat_params(quantize_model(whole.model, scheme))
    kinds = {path: type(leaf) for path, leaf in found.items()}
    assert kinds == {path: type(leaf) for path, leaf in expected.items()}
    assert QuantizedArray in kinds.values()
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    if scheme == "int4":  # the others differ in dtypes alone, and the engine has tests of its own
        answers = [model.generate(range(20), max_new_tokens=4, temperature=0).ids for model in (loaded, whole)]
        assert answers[0] == answers[1]


def test_inspect_shows_and_verifies_it(checkpoint, tmp_path, capsys):
    small = convert.convert(checkpoint, tmp_path / "small", quantize="int4")
    report = inspect.summary(small)
    assert report["quantize"] == manifest.read_manifest(small)["quantize"] == "int4"
    assert report["parameters"] == inspect.summary(checkpoint)["parameters"]
    assert {"int4", "int8", "float32", "bfloat16"} == set(report["dtypes"])
    assert report["file_bytes"] < report["bytes"] < inspect.summary(checkpoint)["bytes"]
    assert not inspect.verify_files(small)
    assert not inspect.count_non_finite(open_checkpoint(small))
    file = next(path for path in (small / "params").glob("*experts.up_proj.scales/c/**/*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    assert inspect.verify_files(small) == [f"{file.relative_to(small)} was changed: its sha256 differs"]


def test_the_rest_of_the_model_takes_the_dtype(checkpoint, tmp_path):
    small = open_checkpoint(convert.convert(checkpoint, tmp_path / "small", quantize="fp8", dtype="float32"))
    dtypes = {path: array.dtype.name for path, array in small.arrays.items()}
    assert dtypes["lm_head.kernel"] == dtypes["layers.cycle.1.feed_forward.router.kernel"] == "float32"
    assert dtypes["layers.cycle.1.feed_forward.experts.up_proj.values"] == "float8_e4m3fn"


def test_a_lost_file_of_scales_is_written_again(checkpoint, tmp_path, monkeypatch):
    expected = manifest.read_manifest(convert.convert(checkpoint, tmp_path / "expected", quantize="int8"))
    monkeypatch.setattr(zarr, "write_orbax_metadata", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.convert(checkpoint, tmp_path / "result", quantize="int8")
    monkeypatch.undo()
    monkeypatch.setattr(zarr, "PIECE_BYTES", 32768)
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 4096)
    partial = tmp_path / "result.partial"
    files = [path for path in partial.glob("params/*.scales/c/**/*") if path.is_file()]
    files[0].unlink()
    files[-1].write_bytes(b"")
    assert (partial / pieces.JOURNAL).is_file()
    result = manifest.read_manifest(convert.convert(checkpoint, tmp_path / "result", quantize="int8"))
    assert result["files"] == expected["files"]


@pytest.mark.parametrize("to", ["hf", "l4jax"])
def test_what_was_rounded_off_is_not_made_up(checkpoint, tmp_path, to):
    small = convert.convert(checkpoint, tmp_path / "small", quantize="int8")
    with pytest.raises(ValueError, match="quantised to int8, and what was rounded off is lost"):
        convert.convert(small, tmp_path / "again", to=to)
    with pytest.raises(ValueError, match="for l4jax checkpoints, not for hf"):
        convert.convert(checkpoint, tmp_path / "again", to="hf", quantize="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "small"]


def test_training_and_saving_refuse_few_bits_in_one_line(checkpoint, tmp_path):
    from l4jax.checkpoint.load import load

    small = convert.convert(checkpoint, tmp_path / "small", quantize="int8")
    path = "layers.tail.0.self_attn.q_proj.kernel"
    with pytest.raises(ValueError, match=r"q_proj\.kernel in .*small is quantised to int8"):
        load(small, {path: jax.ShapeDtypeStruct((64, 4, 16), jnp.float32)})
    with pytest.raises(ValueError, match="are quantised and cannot be saved"):
        l4jax.load(small, max_len=64).save(tmp_path / "saved")


def test_scales_of_another_shape_are_refused(checkpoint, tmp_path):
    small = convert.convert(checkpoint, tmp_path / "small", quantize="int8")
    file = small / "params" / "layers.cycle.1.feed_forward.experts.up_proj.scales" / "zarr.json"
    content = json.loads(file.read_text())
    size = file.stat().st_size
    content["shape"][-1] -= 1
    file.write_text(json.dumps(content, separators=(",", ":")).ljust(size))
    with pytest.raises(ValueError, match=r"up_proj\.scales"):
        open_checkpoint(small)
