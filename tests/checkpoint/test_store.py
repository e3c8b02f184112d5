"""l4jax checkpoints: what is written comes back, to us and to plain Orbax, and damage does not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from l4jax.checkpoint import load, store, zarr
from l4jax.checkpoint.opening import open_checkpoint
from tests.checkpoint.conftest import random_parameters


def abstract(params):
    return {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in params.items()}


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for path, array in expected.items():
        assert np.asarray(got[path]).tobytes() == np.asarray(array).tobytes(), path


@pytest.fixture
def saved(tmp_path, nine_layers):
    params = random_parameters(nine_layers)
    return store.save(tmp_path / "checkpoint", params, nine_layers), params, nine_layers


def test_what_was_saved_comes_back(saved):
    directory, params, config = saved
    assert_equal(load.load(directory, abstract(params)), params)
    assert open_checkpoint(directory).config == config


def test_orbax_reads_it(saved):
    directory, params, _ = saved
    tree = ocp.StandardCheckpointer().restore(directory / "params")
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    assert_equal({".".join(key.key for key in keys): leaf for keys, leaf in leaves}, params)


def test_an_unrolled_model_saves_and_loads_the_same_checkpoint(saved, tmp_path):
    directory, params, config = saved
    unrolled = load.to_unrolled(params, config)
    assert_equal(load.load(directory, abstract(unrolled)), unrolled)
    assert_equal(load.to_stacked(unrolled, config), params)
    again = store.save(tmp_path / "again", {path: jnp.asarray(a) for path, a in unrolled.items()}, config)
    files = [json.loads((d / "manifest.json").read_text())["files"] for d in (directory, again)]
    assert files[0] == files[1]


def test_a_part_of_the_model_loads_alone(saved):
    directory, params, _ = saved
    vision = {path: array for path, array in params.items() if path.startswith("vision_model.")}
    assert_equal(load.load(directory, abstract(vision)), vision)


def test_dtype_follows_the_model(saved):
    directory, params, _ = saved
    path = "embed_tokens.embedding"
    wanted = {path: jax.ShapeDtypeStruct(params[path].shape, jnp.bfloat16)}
    assert_equal(load.load(directory, wanted), {path: params[path].astype(jnp.bfloat16)})


def test_saving_again_replaces_and_leaves_nothing_behind(saved):
    directory, params, config = saved
    params = {path: array + 1 for path, array in params.items()}
    store.save(directory, params, config)
    assert_equal(load.load(directory, abstract(params)), params)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_foreign_files_are_not_replaced(tmp_path, nine_layers):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        store.save(tmp_path, random_parameters(nine_layers), nine_layers)


def test_a_flipped_bit_is_an_error_for_every_reader(saved):
    directory, params, _ = saved
    file = directory / "params" / "lm_head.kernel" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"lm_head\.kernel is damaged"):
        load.load(directory, abstract(params))
    with pytest.raises(ValueError, match="Digest mismatch"):
        # As Orbax opens it; its own restore raises the same error.
        ts.open({"driver": "zarr3", "kvstore": f"file://{directory}/params/lm_head.kernel/"}).result().read().result()


def test_a_cut_or_missing_file_is_named(saved):
    directory, _, _ = saved
    file = directory / "params" / "norm.scale" / "c" / "0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"norm\.scale.*expected"):
        open_checkpoint(directory)
    file.unlink()
    with pytest.raises(ValueError, match=r"norm\.scale.* is missing"):
        open_checkpoint(directory)


def test_parameters_of_another_model_are_refused(saved, tmp_path):
    _, params, config = saved
    params["norm.scale"] = params["norm.scale"][:-1]
    with pytest.raises(ValueError, match=r"norm\.scale: the config asks for"):
        store.save(tmp_path / "other", params, config)


@pytest.mark.parametrize("shape", [(12, 16, 5120, 8192), (5120, 202048), (131071, 5120), (12, 5120, 40, 128), (7,)])
def test_pieces_are_bounded_and_chunks_divide_them(shape):
    piece = zarr.piece_shape(shape, 2)
    chunk = zarr.chunk_shape(piece, 2)
    assert np.prod(piece) * 2 <= zarr.PIECE_BYTES
    assert np.prod(piece) == np.prod(shape) or np.prod(piece) * 2 > zarr.PIECE_BYTES / 4
    assert np.prod(chunk) * 2 <= zarr.CHUNK_BYTES
    assert all(p % c == 0 for p, c in zip(piece, chunk, strict=True))


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_are_written_like_everything_else(tmp_path, nine_layers, value):
    """Zarr would leave out what equals its fill value, and a lost file would then read as zeros."""
    params = {path: np.full_like(array, value) for path, array in random_parameters(nine_layers).items()}
    directory = store.save(tmp_path / "zeros", params, nine_layers)
    assert_equal(load.load(directory, abstract(params)), params)
    file = directory / "params" / "norm.scale" / "c" / "0"
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        open_checkpoint(directory)
