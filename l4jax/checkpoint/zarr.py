"""Arrays on disk in the layout that Orbax restores (zarr3), written and read by boxes through TensorStore.

Orbax itself wants whole arrays; here memory does not grow with the model. Each piece is one file of small chunks, and
each chunk carries a crc32c, so that a flipped bit is an error in every reader: with Orbax's default layout it is a
wrong number.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from l4jax.checkpoint.lazy import Index, LazyArray, Picked

PIECE_BYTES = 64 << 20
"""Aim for the size of a file, which is also the unit of memory, of progress and of what a kill can lose."""
CHUNK_BYTES = 1 << 20
"""Aim for the size of a chunk, the unit of reading: small enough that a device reads about its own part."""


@dataclass(frozen=True)
class Stored:
    """An array on disk, opened by TensorStore."""

    store: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    def read(self, index: Index) -> np.ndarray:
        return self._checked(self.store[index].read())

    def read_into(self, index: Index, target: np.ndarray) -> None:
        """Reads a box into an array of its shape and any float dtype: chunk by chunk, without a copy of the whole."""
        memory = ts.array(target)
        if memory.dtype != self.store.dtype:
            memory = ts.cast(memory, self.store.dtype)
        self._checked(memory.write(self.store[index]))

    def _checked(self, future: ts.Future):
        try:
            return future.result()
        except ValueError as error:
            path = self.store.kvstore.path.rstrip("/")
            raise ValueError(f"{path} is damaged ({_first_line(error)}); fetch or convert it again") from None


def pick(array: LazyArray, position: int | None) -> LazyArray:
    """Returns one layer of a stack; the array itself if it is none."""
    if position is None:
        return array
    return Stored(array.store[position]) if isinstance(array, Stored) else Picked(array, position)


def _first_line(error: Exception) -> str:
    return str(error).split(" [")[0].splitlines()[0][:200]


def piece_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of one file's worth: as many trailing axes as fit in PIECE_BYTES, then a part of the next."""
    piece, size = [1] * len(shape), itemsize
    for axis in reversed(range(len(shape))):
        piece[axis] = min(shape[axis], max(1, PIECE_BYTES // size))
        if piece[axis] < shape[axis]:
            piece[axis] = _even_part(shape[axis], piece[axis])
            break
        size *= shape[axis]
    return tuple(piece)


def source_friendly_piece(path: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of a file of a parameter, cut so that each piece is a run of rows of the source tensor.

    A Linear weight is transposed, so it is cut along its outputs: cut along its inputs, every piece would touch every
    page of the source.
    """
    transposed = path.endswith(".kernel")
    if not transposed:
        return piece_shape(shape, itemsize)
    stacked = 1 if ".cycle." in path else 0
    inputs = len(shape) - stacked - 1 if path.endswith("o_proj.kernel") else 1
    return piece_along_outputs(shape, itemsize, range(stacked, stacked + inputs))


def piece_along_outputs(shape: tuple[int, ...], itemsize: int, inputs: Iterable[int]) -> tuple[int, ...]:
    """Returns the shape of a file that is cut along the axes `inputs` last, so that it has them whole if they fit."""
    inputs = list(inputs)
    first = [axis for axis in range(len(shape)) if axis < inputs[0]]
    order = [*first, *(axis for axis in range(len(shape)) if axis not in (*first, *inputs)), *inputs]
    turned = piece_shape(tuple(shape[axis] for axis in order), itemsize)
    return tuple(turned[order.index(axis)] for axis in range(len(shape)))


def chunk_shape(piece: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of a chunk: the piece with its widest axes halved in turn until CHUNK_BYTES is met."""
    chunk = list(piece)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        even = [axis for axis in range(len(chunk)) if chunk[axis] % 2 == 0]
        if not even:
            break
        chunk[max(even, key=lambda axis: chunk[axis])] //= 2
    return tuple(chunk)


def _even_part(size: int, limit: int) -> int:
    """Returns a part of at most `limit`: a divisor of `size`, or, where that would be small, parts about equal."""
    divisor = next(d for d in range(limit, 0, -1) if size % d == 0)
    if 2 * divisor >= limit:
        return divisor
    step = next(step for step in (64, 8, 1) if step <= limit)  # a power of two can be halved into chunks
    part = math.ceil(size / math.ceil(size / limit))
    return min(math.ceil(part / step), limit // step) * step


def create_array(directory: Path, path: str, shape: tuple[int, ...], dtype: np.dtype, piece: tuple[int, ...]):
    """Creates (or reopens) the array of one parameter, as Orbax lays it out. Its chunks are checksummed."""
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    # Zarr gives int4 a byte each; of 16 different bytes zstd makes less than half, more than packing would.
    packed = [plain[0], {"name": "zstd", "configuration": {"level": 1}}, plain[1]]
    codecs = packed if dtype.name == "int4" else plain
    sharding = {"chunk_shape": chunk_shape(piece, dtype.itemsize), "codecs": codecs, "index_codecs": plain}
    opening = ts.open(
        _spec(directory, path)
        | {
            # Zeros are data too: a file that is left out could not be told from one that was lost.
            "store_data_equal_to_fill_value": True,
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "fill_value": 0.0,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": piece}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
        },
        open=True,
        create=True,
        context=_CONTEXT,
    )
    return _done(opening, f"{directory / path}")


def open_array(directory: Path, path: str) -> Stored:
    """Opens the array of one parameter for reading."""
    return Stored(ts.open(_spec(directory, path), open=True, read=True, context=_CONTEXT).result())


def open_orbax_array(directory: Path, path: str, metadata: Mapping) -> Stored:
    """Opens an array that Orbax wrote, whatever its layout; `metadata` is the content of its `_METADATA`."""
    spec = _spec(directory, path)
    if metadata.get("use_ocdbt"):
        spec["kvstore"] = {"driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": f"{path}/"}
    if not metadata.get("use_zarr3"):
        spec["driver"] = "zarr"
    return Stored(ts.open(spec, open=True, read=True, context=_CONTEXT).result())


def _spec(directory: Path, path: str) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{directory / path}/"}}


# No cache: every byte is used once. Files are synced all together before the manifest is written.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})


def piece_file(directory: Path, path: str, piece: tuple[int, ...], box: Index) -> Path:
    """Returns the file that holds the piece at `box`."""
    return directory.joinpath(path, "c", *(str(part.start // size) for part, size in zip(box, piece, strict=True)))


def write_box(store: ts.TensorStore, box: Index, values: np.ndarray) -> None:
    """Writes one box, converting to the array's dtype. Strided views are transposed on the way, outside of the GIL."""
    target = store if store.dtype.numpy_dtype == values.dtype else ts.cast(store, _ts_dtype(values.dtype))
    # TensorStore copies what it is given unless told that nobody will change it; files and finished arrays do not.
    _done(target[box].write(values, can_reference_source_data_indefinitely=True), store.kvstore.path)


def _done(future: ts.Future, path: str):
    """Returns the result; what the operating system refused becomes its OSError."""
    try:
        return future.result()
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), path) from None
        raise


def _ts_dtype(dtype: np.dtype) -> ts.dtype:
    return ts.dtype(dtype.name)


def write_orbax_metadata(directory: Path, paths: Iterable[str]) -> None:
    """Writes the files by which Orbax knows the tree, and marks the directory as complete."""
    tree = {}
    for path in paths:
        keys = path.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dictionary key
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / "_METADATA").write_text(json.dumps(metadata))
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    checkpoint = {"item_handlers": handler, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint))
    (directory / "commit_success.txt").write_text("Written by l4jax.\n")
