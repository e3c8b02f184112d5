"""PyTorch `.pth` files without torch: a zip of raw storages, and a pickle that says how tensors lie in them.

A pickle is a program. This reader runs it with a dozen harmless names (torch's rebuild functions, storage types,
dtypes, OrderedDict, BytesIO) and refuses every other one, so nothing in a file is ever executed. Tensors are views of
the mapped file.
"""

import collections
import io
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.checkpoint.safetensors import MappedFile

MAX_PICKLE = 256 << 20  # bytes; Meta's are a few MB

_DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "uint8": np.uint8,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class _Dtype:
    name: str


@dataclass(frozen=True)
class _Storage:
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""
    dtype: _Dtype | None
    """None for storages without a type, whose tensors bring their own."""


def read_pth(path: Path) -> tuple[dict[str, Any], MappedFile]:
    """Returns the saved dictionary, its tensors as read-only views of the file, and the mapping of the file.

    Raises:
        ValueError: no file that torch.save wrote, damaged, or one whose pickle asks for more than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            name = next((n for n in members if n.endswith("/data.pkl") or n == "data.pkl"), None)
            if name is None:
                raise ValueError("no data.pkl inside")
            prefix = name.removesuffix("data.pkl")
            order = members.get(f"{prefix}byteorder")
            for info in filter(None, (members[name], order)):
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_PICKLE:
                    raise ValueError(f"{info.filename} of {info.file_size} bytes, method {info.compress_type}")
            if order and archive.read(order) != b"little":
                raise ValueError("big-endian numbers")
            program = archive.read(name)
        mapped = MappedFile(path)
        content = _Unpickler(program, path, prefix, members, mapped).load()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is no complete .pth file ({error}): the download stopped early, or torch before 1.6 saved it; "
            "fetch it again"
        ) from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {error}") from None
    except _BROKEN as error:
        raise ValueError(f"{path}: broken .pth file ({type(error).__name__}: {error}); fetch it again") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content, mapped


# What the pickle machine, numpy and zipfile raise on nonsense; anything else would be a fault of ours.
_BROKEN = (
    *(ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, MemoryError),
    *(struct.error, OSError, RuntimeError),
)


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: bytes, path: Path, prefix: str, members: dict, mapped: MappedFile):
        super().__init__(io.BytesIO(program))
        self.path, self.prefix, self.members, self.mapped = path, prefix, members, mapped
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Dtype(name)
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self.rebuild_parameter,
            ("torch.storage", "UntypedStorage"): None,
            ("torch.serialization", "_get_layout"): str,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("_io", "BytesIO"): io.BytesIO,
            ("_codecs", "encode"): self.encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}, which no checkpoint needs; nothing was run. "
                "Do not load this file with other programs either"
            )
        return allowed[module, name]

    def persistent_load(self, reference: tuple) -> _Storage:
        kind, dtype, key, _, _ = reference
        if kind != "storage" or not isinstance(key, str) or not isinstance(dtype, _Dtype | None):
            raise ValueError("unknown kind of reference")
        if key not in self.storages:
            info = self.members[f"{self.prefix}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"storage {key} is compressed or encrypted")
            self.storages[key] = _Storage(_data_offset(self.path, info), info.file_size, dtype)
        return self.storages[key]

    def rebuild_tensor(self, storage, offset, shape, strides, requires_grad, hooks, dtype=None, metadata=None):
        dtype = dtype or storage.dtype
        if not isinstance(storage, _Storage) or not isinstance(dtype, _Dtype):
            raise ValueError("a tensor without storage or dtype")
        dtype = np.dtype(_DTYPES[dtype.name])
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or not len(shape) == len(strides) <= 8:
            raise ValueError("a tensor with impossible sizes")
        if 0 in shape:
            return np.empty(shape, dtype)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.size:
            raise ValueError(f"a tensor of shape {list(shape)} reaches past its storage of {storage.size} bytes")
        flat = self.mapped.array(dtype, (last + 1 - offset,), storage.offset + offset * dtype.itemsize)
        return np.lib.stride_tricks.as_strided(
            flat, shape, [stride * dtype.itemsize for stride in strides], writeable=False
        )

    def encode(self, text: str, codec: str) -> bytes:
        """How old pickle protocols write bytes."""
        if codec != "latin1":
            raise ValueError(f"bytes in codec {codec!r}")
        return text.encode("latin1")

    def rebuild_parameter(self, data: Any, requires_grad: bool, hooks: Any) -> Any:
        return data


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Returns where the bytes of a stored member begin: behind the local header, whose lengths may differ."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{info.filename} has no local header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        file.seek(0, io.SEEK_END)
        if start + info.file_size > file.tell():
            raise ValueError(f"{info.filename} reaches past the end of the file")
    return start
