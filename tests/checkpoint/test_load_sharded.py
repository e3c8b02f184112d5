"""Restores on meshes of emulated devices: the same numbers, born sharded, each device reading about its share."""

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from l4jax.checkpoint import convert, lazy, load, store, zarr
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.config import preset
from tests.checkpoint.conftest import random_parameters


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = preset("small-maverick")
    params = random_parameters(config)
    return store.save(tmp_path_factory.mktemp("sharded") / "checkpoint", params, config), params


def sharded(params, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Each mesh axis cuts the largest axis of an array that it divides and that is still whole."""
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
    abstract = {}
    for path, array in params.items():
        spec = [None] * array.ndim
        for name, size in zip(mesh.axis_names, shape, strict=True):
            free = [axis for axis in range(array.ndim) if spec[axis] is None and array.shape[axis] % size == 0]
            if free:
                spec[max(free, key=lambda axis: array.shape[axis])] = name
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        abstract[path] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return abstract


@pytest.mark.parametrize("shape", [(1,), (2, 2), (8,)])
@pytest.mark.parametrize("source", ["l4jax", "hf"])
def test_any_mesh_gets_the_same_numbers(checkpoint, tmp_path, shape, source):
    directory, params = checkpoint
    if source == "hf":
        directory = convert.convert(directory, tmp_path / "hf", to="hf")
    abstract = sharded(params, shape)
    loaded = load.load(directory, abstract)
    for path, array in params.items():
        assert loaded[path].sharding == abstract[path].sharding
        np.testing.assert_array_equal(loaded[path], array)


def bytes_read() -> int:
    metric = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric[0]["values"][0]["value"] if metric else 0


@pytest.mark.parametrize("shape", [(2, 2), (8,)])
@pytest.mark.parametrize("path", ["layers.cycle.0.feed_forward.experts.up_proj", "lm_head.kernel"])
def test_a_device_reads_about_its_share(tmp_path, path, shape):
    """On arrays large enough to have chunks: 32 MB, in chunks of at most 1 MiB."""
    size = (1, 4, 1024, 4096) if "experts" in path else (1024, 16384)
    values = np.random.default_rng(0).integers(0, 1 << 15, size).astype(np.uint16).view("bfloat16")
    piece = zarr.source_friendly_piece(path, size, 2)
    target = zarr.create_array(tmp_path, path, size, values.dtype, piece)
    for box in lazy.boxes(size, piece):
        zarr.write_box(target, box, values[box])
    leaf = sharded({path: values}, shape)[path]
    boxes = leaf.sharding.addressable_devices_indices_map(size).values()
    for box in list(boxes)[:3]:
        plain = tuple(slice(*part.indices(n)[:2]) for part, n in zip(box, size, strict=True))
        before = bytes_read()
        part = zarr.open_array(tmp_path, path).read(plain)
        assert part.tobytes() == values[box].tobytes()
        assert 0.9 * part.nbytes < bytes_read() - before < 1.1 * part.nbytes + 10_000


def test_pictures_or_words_alone_read_only_their_files(checkpoint, monkeypatch):
    directory, params = checkpoint
    opened = open_checkpoint(directory)
    read = set()
    real = zarr.Stored.read_into

    def noted(self, box, target):
        read.add(self.store.kvstore.path.rstrip("/").rpartition("/")[2])
        real(self, box, target)

    monkeypatch.setattr(zarr.Stored, "read_into", noted)
    vision = {path for path in params if path.startswith(("vision_model.", "multi_modal_projector."))}
    for wanted in (vision, set(params) - vision):
        read.clear()
        abstract = {path: jax.ShapeDtypeStruct(params[path].shape, params[path].dtype) for path in wanted}
        assert set(load.load(opened, abstract)) == wanted
        assert read == wanted
