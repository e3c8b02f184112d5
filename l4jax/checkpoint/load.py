"""Checkpoints into jax arrays: born on their devices, each device reading only its own part of the files."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from l4jax.checkpoint import names
from l4jax.checkpoint.lazy import Index, LazyArray, boxes, read_into
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.source import Source
from l4jax.checkpoint.zarr import pick, source_friendly_piece
from l4jax.config import Llama4Config
from l4jax.ops import QuantizedArray

Leaf = jax.ShapeDtypeStruct | QuantizedArray
"""A parameter that is wanted; a quantised one has two shapes."""


def load(source: Source | str | Path, abstract: Mapping[str, Leaf]) -> dict[str, jax.Array | QuantizedArray]:
    """Returns the parameters that `abstract` asks for, with its dtypes and shardings.

    Paths may be stacked or unrolled, and may be a part of the model: what is not asked for is not read. Leaves are read
    one after the other, so that memory stays about one leaf above the result.

    Args:
        source: a checkpoint or its directory.
        abstract: path -> shape, dtype and sharding (None: the default device). What is quantised in the checkpoint
            must be asked for in that form, and only that.

    Raises:
        KeyError: the checkpoint has no such parameter.
        ValueError: a shape differs, or the files are damaged.
    """
    if not isinstance(source, Source):
        source = open_checkpoint(source)
    parts = {path: _parts(path, leaf) for path, leaf in abstract.items()}
    arrays = select(source, [part for found in parts.values() for part in found])
    loaded = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, leaf in abstract.items():
            read = [_load_leaf(pool, part, arrays[part], one, source.release) for part, one in parts[path].items()]
            loaded[path] = jax.tree.unflatten(jax.tree.structure(leaf), read)
    return loaded


def _parts(path: str, leaf: Leaf) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the arrays on disk that make up a parameter."""
    if not isinstance(leaf, QuantizedArray):
        return {path: leaf}
    return {f"{path}.values": leaf.values, f"{path}.scales": leaf.scales}


def select(source: Source, paths: Iterable[str]) -> dict[str, LazyArray]:
    """Returns the lazy arrays at stacked or unrolled `paths`."""
    found, ends = {}, {path: names.quantized_end(path) for path in paths}
    places = names.places(source.config, [path.removesuffix(end) for path, end in ends.items()])
    for path, end in ends.items():
        place, position = places[path.removesuffix(end)]
        place += end
        if f"{place}.values" in source.arrays:
            raise ValueError(
                f"{path} in {source.directory} is quantised to {source.quantize}, for inference alone; "
                "use the checkpoint that it was made from"
            )
        if place not in source.arrays:
            raise KeyError(f"{source.directory} has no {path}")
        found[path] = pick(source.arrays[place], position)
    return found


def _load_leaf(
    pool: ThreadPoolExecutor, path: str, array: LazyArray, leaf: jax.ShapeDtypeStruct, release: Callable[[], None]
) -> jax.Array:
    if tuple(array.shape) != tuple(leaf.shape):
        raise ValueError(
            f"{path} has shape {list(array.shape)} in the checkpoint and {list(leaf.shape)} in the model; "
            "the model was made for another config"
        )
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    read: dict[tuple, np.ndarray] = {}  # replicas of one box are read once
    shards = []
    for device, index in sharding.addressable_devices_indices_map(tuple(array.shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
        if bounds not in read:
            read[bounds] = _read_box(pool, path, array, bounds, np.dtype(leaf.dtype), release)
        # Nobody else has the buffer, so a device in this machine's memory may keep it instead of a copy.
        shards.append(jax.device_put(read[bounds], device, may_alias=True))
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), sharding, shards)


def _read_box(
    pool: ThreadPoolExecutor,
    path: str,
    array: LazyArray,
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
    release: Callable[[], None],
) -> np.ndarray:
    """Returns a box of a parameter in memory of its own; threads fill it piece by piece."""
    values = _aligned_empty([stop - start for start, stop in bounds], dtype)

    def fill(box: Index) -> None:
        place = tuple(slice(b.start + low, b.stop + low) for b, (low, _) in zip(box, bounds, strict=True))
        read_into(array, place, values[box])
        release()

    list(pool.map(fill, boxes(values.shape, source_friendly_piece(path, values.shape, dtype.itemsize))))
    return values


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """`np.empty` at an address that is a multiple of 64 bytes, as jax wants it to take the buffer over."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def to_stacked(params: Mapping[str, object], config: Llama4Config) -> dict[str, object]:
    """Returns stacked parameters of unrolled ones (`layers.tail.*` only); numpy or jax arrays, leaf by leaf."""
    stacks: dict[str, dict[int, object]] = {}
    stacked = {}
    for layer in names.layer_shapes(config):
        array = params[names.unrolled_path(layer)]
        place, position = names.locate(config, layer)
        if position is None:
            stacked[place] = array
        else:
            stacks.setdefault(place, {})[position] = array
    for place, members in stacks.items():
        ordered = [members[position] for position in sorted(members)]
        stacked[place] = np.stack(ordered) if isinstance(ordered[0], np.ndarray) else jax.numpy.stack(ordered)
    return stacked


def to_unrolled(params: Mapping[str, object], config: Llama4Config) -> dict[str, object]:
    """Returns unrolled parameters (`layers.tail.*` only) of stacked ones; numpy or jax arrays."""
    unrolled = {}
    for layer in names.layer_shapes(config):
        place, position = names.locate(config, layer)
        unrolled[names.unrolled_path(layer)] = params[place] if position is None else params[place][position]
    return unrolled
