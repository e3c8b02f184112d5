"""Hugging Face checkpoints: safetensors, whole or sharded with an index; experts fused or one by one; bf16 or FP8."""

from pathlib import Path

import ml_dtypes
import numpy as np

from l4jax.checkpoint import names
from l4jax.checkpoint.lazy import LazyArray, Scaled, View
from l4jax.checkpoint.names import Row
from l4jax.checkpoint.safetensors import DTYPES, MappedFile, TensorInfo, read_header
from l4jax.checkpoint.source import (
    Source,
    account,
    check_shape,
    choose_rows,
    gather_parts,
    read_json,
    stack_layers,
)
from l4jax.config import Llama4Config, load_config

INDEX = "model.safetensors.index.json"
FLOAT8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])
FLOATS = (*FLOAT8, DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"], DTYPES["F64"])

# Endings of tensors that change nothing in what we compute, and why.
IGNORED = {
    ".input_scale": "static scale of quantised activations; l4jax keeps activations in bfloat16",
    ".input_scale_ub": "upper bound of quantised activations",
    ".activation_scale_ub": "upper bound of quantised activations",
    "rotary_emb.inv_freq": "rotary frequencies; computed from the config",
}


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files that make up the checkpoint.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
        ValueError: the index is broken or points out of the directory.
    """
    index = directory / INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no *.safetensors and no {INDEX} in {directory}")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor to file; fetch it again")
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}; expected plain names of *.safetensors files beside it")
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            held = sorted(key for key, file in weight_map.items() if file == name)
            raise FileNotFoundError(
                f"{directory / name} is named in the index but absent (it holds {held[0]} and {len(held) - 1} more "
                "tensors); fetch it again"
            )
    return [directory / name for name in sorted(set(weight_map.values()))]


def open_hf(directory: Path, config: Llama4Config | None = None) -> Source:
    """Opens a directory with `config.json` and safetensors. Only headers are read.

    Args:
        config: instead of the directory's own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or tensors and config do not fit each other.
    """
    config = config or load_config(directory)
    files = weight_files(directory)
    infos: dict[str, tuple[Path, TensorInfo]] = {}
    for path in files:
        for key, info in read_header(path).items():
            if key in infos:
                raise ValueError(f"{key} is in {infos[key][0].name} and in {path.name}; remove one of the files")
            infos[key] = (path, info)
    rows = candidate_rows(config, infos)
    chosen = choose_rows(rows, infos)
    scales = {row.key: key for row in chosen if (key := f"{row.key}_scale") in infos}
    ignored = {key: reason for key in infos for ending, reason in IGNORED.items() if key.endswith(ending)}
    ignored |= {key: "scale of a quantised tensor, used with it" for key in scales.values()}
    account(directory, rows, chosen, infos, ignored)

    maps = {path: MappedFile(path) for path in files}

    def tensor(key: str) -> np.ndarray:
        path, info = infos[key]
        return maps[path].array(info.dtype, info.shape, info.offset)

    pieces: dict[tuple[str, int | None], LazyArray] = {}
    for row in chosen:
        path, info = infos[row.key]
        sizes = [names.part_sizes(config, part.path) for part in row.parts]
        check_shape(path.name, row.key, info.shape, names.row_shape(row, sizes))
        if info.dtype not in FLOATS:
            raise ValueError(f"{path.name}: {row.key} is {info.dtype}; only float weights are read")
        views = names.split_row(tensor(row.key), row, sizes)
        if row.key not in scales:
            if info.dtype in FLOAT8:
                raise ValueError(f"{path.name}: {row.key} is {info.dtype} without {row.key}_scale")
            pieces |= {(part.path, part.expert): View(view) for part, view in views}
            continue
        scale = spread_scale(row, tensor(scales[row.key]), info.shape, path.name)
        for (part, view), (_, scale_view) in zip(views, names.split_row(scale, row, sizes), strict=True):
            pieces[part.path, part.expert] = Scaled(view, scale_view, np.dtype(ml_dtypes.bfloat16))

    def release() -> None:
        for mapped in maps.values():
            mapped.release()

    ignored = {key: reason for key, reason in ignored.items() if key not in scales.values()}
    arrays = stack_layers(config, gather_parts(pieces))
    return Source(directory, "hf", config, arrays, files, ignored, release)


def candidate_rows(config: Llama4Config, available) -> list[Row]:
    """Returns the rows that could name these tensors: either prefix, both forms of the experts, the likeliest first."""
    prefix = "" if "model.embed_tokens.weight" in available else "language_model."
    fused = names.hf_rows(config, text_prefix=prefix)
    if not any(".experts.0." in key for key in available):
        return fused
    single = names.hf_rows(config, text_prefix=prefix, expert_form="single")
    fused_keys = {row.key for row in fused}
    # A file may quantise some layers expert by expert and leave others fused.
    extra = [row for row in single if row.key not in fused_keys]
    split_layers = {row.key.split(".experts.")[0] for row in extra if row.key in available}
    kept = [r for r in fused if ".experts." not in r.key or r.key.split(".experts.")[0] not in split_layers]
    return kept + [row for row in extra if row.key.split(".experts.")[0] in split_layers]


def spread_scale(row: Row, scale: np.ndarray, shape: tuple[int, ...], file: str) -> np.ndarray:
    """Returns the scale of a quantised tensor broadcast to its shape.

    compressed-tensors: one scale for a row, [out, 1], or for the tensor, [1]. fbgemm: gate_up_proj [E, 1, 2F], and
    down_proj [E, D, 1], which lies crosswise to its [E, F, D] tensor.
    """
    if row.key.endswith("experts.down_proj") and scale.ndim == 3:
        scale = scale.swapaxes(1, 2)
    if scale.ndim == 1 and scale.size > 1:
        scale = scale[:, None]
    try:
        return np.broadcast_to(scale, shape)
    except ValueError:
        raise ValueError(
            f"{file}: {row.key}_scale of shape {list(scale.shape)} is not one scale for a tensor or for a channel of "
            f"{list(shape)}; scales by block are not supported"
        ) from None
