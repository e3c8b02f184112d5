"""l4jax checkpoints: `params/` (Orbax, zarr3), `config.json`, tokenizer and licence files, `manifest.json`.

Arrays are written through TensorStore in the layout that Orbax restores, piece by piece, so that memory does not grow
with the model; Orbax itself wants whole arrays. Each piece is one file of small chunks, and each chunk carries a
crc32c, so that a flipped bit is an error in every reader: with Orbax's default layout it is a wrong number.
The manifest has size and sha256 of every file. It is written last, and a directory without it is unfinished.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from l4jax.checkpoint.lazy import Index, LazyArray, Stacked, View, boxes, everything
from l4jax.checkpoint.names import parameter_shapes, places
from l4jax.checkpoint.pieces import JOURNAL
from l4jax.checkpoint.source import Source, read_json
from l4jax.config import Llama4Config, load_config

MANIFEST = "manifest.json"
FORMAT = "l4jax-checkpoint-1"
PIECE_BYTES = 64 << 20
"""Aim for the size of a file, which is also the unit of memory, of progress and of what a kill can lose."""
CHUNK_BYTES = 1 << 20
"""Aim for the size of a chunk, the unit of reading: small enough that a device reads about its own part."""

# Files that are no weights and travel with every checkpoint.
COMPANIONS = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
NOTICE = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)
LEGAL = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*")


# --- Arrays -------------------------------------------------------------------------------------------------------


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


def _first_line(error: Exception) -> str:
    return str(error).split(" [")[0].splitlines()[0][:200]


def piece_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of one file's worth: as many trailing axes as fit in PIECE_BYTES, then a part of the next."""
    piece, size = [1] * len(shape), itemsize
    for axis in reversed(range(len(shape))):
        piece[axis] = min(shape[axis], max(1, PIECE_BYTES // size))
        if piece[axis] < shape[axis]:
            piece[axis] = _largest_divisor(shape[axis], piece[axis])
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
    outputs = shape[-1:] if path.endswith("o_proj.kernel") else shape[stacked + 1 :]
    inputs = shape[stacked : len(shape) - len(outputs)]
    turned = piece_shape((*shape[:stacked], *outputs, *inputs), itemsize)
    return (*turned[:stacked], *turned[stacked + len(outputs) :], *turned[stacked : stacked + len(outputs)])


def chunk_shape(piece: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of a chunk: the piece with its widest axes halved in turn until CHUNK_BYTES is met."""
    chunk = list(piece)
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        even = [axis for axis in range(len(chunk)) if chunk[axis] % 2 == 0]
        if not even:
            break
        chunk[max(even, key=lambda axis: chunk[axis])] //= 2
    return tuple(chunk)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(limit, 0, -1) if number % d == 0)


def create_array(directory: Path, path: str, shape: tuple[int, ...], dtype: np.dtype, piece: tuple[int, ...]):
    """Creates (or reopens) the array of one parameter, as Orbax lays it out. Its chunks are checksummed."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": chunk_shape(piece, dtype.itemsize), "codecs": codecs, "index_codecs": codecs}
    opening = ts.open(
        _spec(directory, path)
        | {
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "fill_value": 0.0,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": piece}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            }
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


# --- Directories --------------------------------------------------------------------------------------------------


def open_store(directory: Path) -> Source:
    """Opens an l4jax checkpoint. Only metadata has been read; sizes of all files are compared with the manifest.

    Raises:
        FileNotFoundError: the directory is no finished checkpoint.
        ValueError: files are missing or have another size, or arrays and config do not fit each other.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    config, params = load_config(directory), directory / "params"
    expected = parameter_shapes(config)
    stored = {path.parent.name for path in params.glob("*/zarr.json")}
    if missing := sorted(set(expected) - stored):
        raise ValueError(f"{params} lacks {', '.join(missing[:12])} ({len(missing)} in all); config.json needs them")
    arrays = {path: open_array(params, path) for path in expected}
    for path, array in arrays.items():
        if array.shape != expected[path]:
            raise ValueError(
                f"{params / path} has shape {list(array.shape)}, config.json asks for {list(expected[path])}; "
                "the config belongs to other weights"
            )
    files = [directory / name for name in manifest["files"] if name.startswith("params/")]
    return Source(directory, "l4jax", config, arrays, files)


def save(
    directory: str | Path,
    params: Mapping[str, object],
    config: Llama4Config,
    *,
    companions: str | Path | None = None,
    dtype: str | None = None,
    notes: Mapping[str, object] | None = None,
) -> Path:
    """Writes a finished checkpoint; what was there before is replaced only when the new one is complete.

    Args:
        params: path -> array (jax or numpy), stacked or unrolled. They are written one after the other.
        companions: directory whose tokenizer, template and licence files go into the checkpoint.
        dtype: "bfloat16", "float32", ...; None keeps the dtype of each array.
        notes: recorded in the manifest.

    Raises:
        ValueError: the parameters are not those of `config`.
        FileExistsError: `directory` holds something that is no l4jax checkpoint.
    """
    directory = Path(directory)
    check_target(directory)
    arrays = stacked_views(params, config)
    partial = partial_directory(directory)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "params").mkdir(parents=True)
    for path, array in arrays.items():
        wanted = np.dtype(dtype) if dtype else array.dtype
        piece = piece_shape(array.shape, wanted.itemsize)
        store = create_array(partial / "params", path, array.shape, wanted, piece)
        values = View(np.asarray(array.read(everything(array.shape))))
        for box in boxes(array.shape, piece):
            write_box(store, box, values.read(box))
    write_orbax_metadata(partial / "params", arrays)
    (partial / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    if companions is not None:
        copy_companions(Path(companions), partial)
    write_manifest(partial, {"notes": dict(notes or {})})
    finish(partial, directory)
    return directory


def stacked_views(params: Mapping[str, object], config: Llama4Config) -> dict[str, LazyArray]:
    """Returns the parameters of a live model, stacked or unrolled, as lazy arrays in the stacked form.

    Raises:
        KeyError, ValueError: paths or shapes are not those of `config`.
    """
    expected, stacks = parameter_shapes(config), {}
    for path, (place, position) in places(config, params).items():
        stacks.setdefault(place, {})[position] = LiveArray(params[path])
    arrays = {
        place: members[None] if None in members else Stacked(tuple(members[i] for i in sorted(members)))
        for place, members in stacks.items()
    }
    for path, shape in expected.items():
        if path not in arrays or tuple(arrays[path].shape) != shape:
            got = list(arrays[path].shape) if path in arrays else "nothing"
            raise ValueError(f"{path}: the config asks for shape {list(shape)}, the parameters have {got}")
    return arrays


@dataclass(frozen=True)
class LiveArray:
    """A jax or numpy array. A read copies it to the host whole: one leaf above what the model takes."""

    array: object

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def read(self, index: Index) -> np.ndarray:
        # Indexing after the copy: jax on CPU may change the payload of a NaN when it slices bfloat16.
        return np.asarray(self.array)[index]


def partial_directory(directory: Path) -> Path:
    """Returns where a checkpoint is put together, beside its final place."""
    return directory.with_name(directory.name + ".partial")


def check_target(directory: Path) -> None:
    """Raises FileExistsError when `directory` holds files that are not ours to replace."""
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        raise FileExistsError(f"{directory} is not empty and no l4jax checkpoint; choose another name or remove it")
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose another name")


def finish(partial: Path, directory: Path) -> None:
    """Gives the complete checkpoint its name."""
    if directory.exists():
        old = directory.with_name(directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        partial.rename(directory)
        shutil.rmtree(old)
    else:
        partial.rename(directory)
    sync(directory.parent)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, template and licence files; returns their names.

    Meta's licence asks every copy to carry a notice; it is added where the licence is there and the notice is not.
    """
    found = [source / name for name in COMPANIONS if (source / name).is_file()]
    found += legal_files(source)
    for path in found:
        if path.resolve() != (target / path.name).resolve():
            shutil.copyfile(path, target / path.name)
    copied = [path.name for path in found]
    licences = [name for name in copied if name.upper().startswith(("LICENSE", "LICENCE"))]
    under_meta = any("Llama 4 Community License" in (target / name).read_text(errors="replace") for name in licences)
    if under_meta and not any(name.upper().startswith("NOTICE") for name in copied):
        (target / "NOTICE").write_text(NOTICE)
        copied.append("NOTICE")
    return copied


def legal_files(directory: Path) -> list[Path]:
    """Returns licence, use policy and notice files of a checkpoint."""
    return sorted({path for pattern in LEGAL for path in directory.glob(pattern) if path.is_file()})


# --- Manifest -----------------------------------------------------------------------------------------------------


def write_manifest(directory: Path, facts: Mapping[str, object], known: Mapping[str, str] | None = None) -> None:
    """Writes size and sha256 of every file below `directory`, after all of them are on disk.

    Args:
        facts: put at the head of the manifest.
        known: sha256 of files that were hashed before, by relative name.
    """
    paths = [directory / name for name in content_files(directory)]
    folders = {directory, *(p.parent for p in paths)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, [*paths, *folders]))
    files = {}
    for path in paths:
        name = path.relative_to(directory).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": (known or {}).get(name) or sha256(path)}
    temporary = directory / f".{MANIFEST}"
    with open(temporary, "w") as file:
        json.dump({"format": FORMAT, **facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / MANIFEST)
    sync(directory)


def content_files(directory: Path) -> list[str]:
    """Returns the names of all files below, except the manifest and the journal of a conversion."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in (MANIFEST, f".{MANIFEST}", JOURNAL))


def read_manifest(directory: Path) -> dict:
    """Returns the manifest.

    Raises:
        FileNotFoundError: there is none, so the directory is no finished checkpoint.
        ValueError: it is not a manifest.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {MANIFEST}: no l4jax checkpoint, or an unfinished one; save or convert it again"
        )
    manifest = read_json(path)
    files = manifest.get("files")
    fits = isinstance(files, dict) and all(
        isinstance(f, dict) and type(f.get("size")) is int and isinstance(f.get("sha256"), str) for f in files.values()
    )
    if manifest.get("format") != FORMAT or not fits:
        raise ValueError(f"{path} is not a manifest of format {FORMAT}; another version wrote it, or it is damaged")
    if unsafe := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{path} names {unsafe[0]!r}; only files below the checkpoint are allowed")
    return manifest


def check_sizes(directory: Path, manifest: Mapping) -> None:
    """Raises ValueError naming files that are missing or have another size than in the manifest."""
    for name, entry in manifest["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            state = "is missing" if size is None else f"has {size} bytes, expected {entry['size']}"
            raise ValueError(f"{path} {state}; the checkpoint is damaged, save or convert it again")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
