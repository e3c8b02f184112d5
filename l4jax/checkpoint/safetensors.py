"""Safetensors files: headers checked before use, tensors as views of the mapped file, and a writer by pieces.

Format: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, then the data.
Files come from strangers, so nothing in a header is believed before it fits the file.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the same limit as the safetensors library

DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a file.

    Raises:
        ValueError: the header is no safetensors header, or promises more than the file holds.
    """
    file_size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MAX_HEADER, file_size - 8):
            raise ValueError(
                f"{path}: the first 8 bytes announce a header of {length} bytes, the file has {file_size}: "
                "not a safetensors file, or the download stopped early; fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("no object")
        header.pop("__metadata__", None)
        infos = {name: _info(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: broken safetensors header ({error}); fetch it again") from None

    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].size)):
        if info.offset != end:
            raise ValueError(f"{path}: tensor {name!r} starts at byte {info.offset}, expected {end}; fetch it again")
        end += info.size
    if end > file_size:
        raise ValueError(
            f"{path} has {file_size} bytes, its header promises {end}: the download stopped early; fetch it again"
        )
    if end < file_size:
        raise ValueError(f"{path} has {file_size - end} bytes that no tensor covers; fetch it again")
    return infos


def _info(entry: Mapping, data_start: int) -> TensorInfo:
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or len(shape) > 8:
        raise ValueError("negative or fractional sizes")
    info = TensorInfo(DTYPES[entry["dtype"]], tuple(shape), data_start + start)
    if info.size != stop - start:
        raise ValueError(f"shape {shape} of {entry['dtype']} takes {info.size} bytes, the offsets say {stop - start}")
    return info


class MappedFile:
    """A file mapped for reading. Pages that were read count as resident memory until `release`."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """Returns a read-only view."""
        return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)

    def release(self) -> None:
        """Hands the pages back to the page cache; the views stay valid."""
        if hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            self._map.madvise(mmap.MADV_DONTNEED)


def encode_header(infos: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Returns the bytes before the data, and the offset of every tensor in the file, in the order given."""
    header, position, starts = {"__metadata__": {"format": "pt"}}, 0, {}
    for name, (dtype, shape) in infos.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        starts[name] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}
