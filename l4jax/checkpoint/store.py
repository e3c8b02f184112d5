"""l4jax checkpoints: `params/` (Orbax), `config.json`, tokenizer and licence files, `manifest.json`."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4jax.checkpoint import zarr
from l4jax.checkpoint.lazy import Index, LazyArray, Stacked, View, boxes, everything
from l4jax.checkpoint.manifest import MANIFEST, check_sizes, read_manifest, sync, write_manifest
from l4jax.checkpoint.names import parameter_shapes, places
from l4jax.checkpoint.source import Source
from l4jax.config import Llama4Config, load_config

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


def open_store(directory: Path) -> Source:
    """Opens an l4jax checkpoint. Only metadata has been read; sizes of all files are compared with the manifest.

    Raises:
        FileNotFoundError: the directory is no finished checkpoint.
        ValueError: files are missing or have another size, or arrays and config do not fit each other.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    config, params, scheme = load_config(directory), directory / "params", manifest.get("quantize")
    stored = {path.parent.name for path in params.glob("*/zarr.json")}
    expected = {}
    for path, shape in parameter_shapes(config).items():
        quantized = scheme is not None and f"{path}.values" in stored
        expected |= {f"{path}.values": shape, f"{path}.scales": shape} if quantized else {path: shape}
    if stored != set(expected):
        missing, more = sorted(set(expected) - stored), sorted(stored - set(expected))
        raise ValueError(
            f"{params} does not fit config.json: {len(missing)} arrays missing ({', '.join(missing[:8])}), "
            f"{len(more)} unexpected ({', '.join(more[:8])})"
        )
    arrays = {path: zarr.open_array(params, path) for path in expected}
    for path, array in arrays.items():
        shape = array.shape
        if path.endswith(".scales") and len(shape) == len(expected[path]) and math.prod(shape):
            shape = tuple(n if n % s == 0 else s for n, s in zip(expected[path], shape, strict=True))  # one for a block
        if shape != expected[path]:
            raise ValueError(
                f"{params / path} has shape {list(array.shape)}, config.json asks for {list(expected[path])}; "
                "the config belongs to other weights"
            )
    files = [directory / name for name in manifest["files"] if name.startswith("params/")]
    return Source(directory, "l4jax", config, arrays, files, quantize=scheme)


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
        params: path -> array (jax or numpy), stacked or unrolled. They are written one after the other. Not quantised:
            few bits are made on the way from released weights, by `l4jax convert`.
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
        piece = zarr.piece_shape(array.shape, wanted.itemsize)
        store = zarr.create_array(partial / "params", path, array.shape, wanted, piece)
        values = View(np.asarray(array.read(everything(array.shape))))
        for box in boxes(array.shape, piece):
            zarr.write_box(store, box, values.read(box))
    zarr.write_orbax_metadata(partial / "params", arrays)
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
    if quantized := [path for path, array in params.items() if hasattr(array, "scales")]:
        raise ValueError(
            f"{quantized[0]} and {len(quantized) - 1} more are quantised and cannot be saved; "
            "copy the directory that they came from, or quantise with `l4jax convert --quantize`"
        )
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
