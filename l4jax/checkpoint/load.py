"""Checkpoints into jax arrays: born on their devices, each device reading only its own part of the files."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from l4jax.checkpoint import names
from l4jax.checkpoint.lazy import LazyArray, Picked, contiguous
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.source import Source
from l4jax.config import Llama4Config


def load(source: Source | str | Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns the parameters that `abstract` asks for, with its dtypes and shardings.

    Paths may be stacked or unrolled, and may be a part of the model: what is not asked for is not read. Leaves are read
    one after the other, so that memory stays about one leaf above the result.

    Args:
        source: a checkpoint or its directory.
        abstract: path -> shape, dtype and sharding (None: the default device).

    Raises:
        KeyError: the checkpoint has no such parameter.
        ValueError: a shape differs, or the files are damaged.
    """
    if not isinstance(source, Source):
        source = open_checkpoint(source)
    arrays = select(source, abstract)
    loaded = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, leaf in abstract.items():
            loaded[path] = _load_leaf(pool, path, arrays[path], leaf)
            source.release()
    return loaded


def select(source: Source, paths: Iterable[str]) -> dict[str, LazyArray]:
    """Returns the lazy arrays at stacked or unrolled `paths`."""
    found = {}
    for path, (place, position) in names.places(source.config, paths).items():
        if place not in source.arrays:
            raise KeyError(f"{source.directory} has no {path}")
        found[path] = source.arrays[place] if position is None else Picked(source.arrays[place], position)
    return found


def _load_leaf(pool: ThreadPoolExecutor, path: str, array: LazyArray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if tuple(array.shape) != tuple(leaf.shape):
        raise ValueError(
            f"{path} has shape {list(array.shape)} in the checkpoint and {list(leaf.shape)} in the model; "
            "the model was made for another config"
        )
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    boxes: dict[tuple, object] = {}  # replicas of one box are read once

    def read(index: tuple[slice, ...]) -> np.ndarray:
        box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, array.shape, strict=True))
        key = tuple((part.start, part.stop) for part in box)
        if key not in boxes:
            values = array.read(box)
            boxes[key] = contiguous(values) if values.dtype == leaf.dtype else values.astype(leaf.dtype)
        return boxes[key]

    return jax.make_array_from_callback(tuple(leaf.shape), sharding, read, dtype=leaf.dtype)


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
