"""Meta checkpoints: `consolidated.*.pth`, one file for each model-parallel rank, and `params.json`."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np

from l4jax.checkpoint import names
from l4jax.checkpoint.lazy import LazyArray, Scaled, View
from l4jax.checkpoint.names import Part
from l4jax.checkpoint.pth import read_pth
from l4jax.checkpoint.safetensors import MappedFile
from l4jax.checkpoint.source import (
    Source,
    account,
    check_shape,
    choose_rows,
    join,
    stack_layers,
)
from l4jax.config import Llama4Config, load_config

# Tensors that change nothing in what we compute, and why.
IGNORED = {
    r"(^|\.)_extra_state$": "state of Meta's FP8 training",
    r"^rope\.freqs$|(^|\.)freqs_cis$|(^|\.)freq_cis$": "rotary frequencies; computed from the config",
    r"\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)$": "routing statistics of training",
    r"^vision_embeddings\.vision_adapter\.fc\.weight$": "left over from training; Meta's loader drops it",
}
_EXPERT_NAMES = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}


def open_meta(directory: Path, config: Llama4Config | None = None) -> Source:
    """Opens a directory with `params.json` and any number of ranks. Only the pickles have been read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or unsafe, or tensors and config do not fit each other.
    """
    config = config or load_config(directory)
    files = rank_files(directory)
    ranks, maps = [], []
    for path in files:
        content, mapped = read_pth(path)
        ranks.append(content)
        maps.append(mapped)
    for path, content in zip(files, ranks, strict=True):
        if different := sorted(set(content) ^ set(ranks[0])):
            raise ValueError(f"{path.name} and {files[0].name} hold different tensors: {', '.join(different[:8])}")
    available = list(ranks[0])
    ignored = {key: why for key in available for pattern, why in IGNORED.items() if re.search(pattern, key)}
    rows = names.meta_rows(config)
    chosen = choose_rows(rows, available)
    account(directory, rows, chosen, available, ignored)
    scales = _read_scales(directory, len(files), maps)

    layers: dict[str, LazyArray] = {}
    for row in chosen:
        sizes = [_share(config, part, len(files)) for part in row.parts]
        pieces: dict[str, list[LazyArray]] = {part.path: [] for part in row.parts}
        for rank, (path, content) in enumerate(zip(files, ranks, strict=True)):
            tensor = content[row.key]
            if not isinstance(tensor, np.ndarray):
                raise ValueError(f"{path.name}: {row.key} is no tensor")
            shape = names.row_shape(row, sizes)
            check_shape(path.name, row.key, tensor.shape, shape)
            for part, view in names.split_row(tensor, row, sizes):
                pieces[part.path].append(_piece(path.name, row.key, view, scales, rank))
        for part in row.parts:
            axis = names.target_letters(part.pattern).index(part.split) if part.split else 0
            layers[part.path] = join(pieces[part.path], axis) if part.split else pieces[part.path][0]

    def release() -> None:
        for mapped in maps:
            mapped.release()

    return Source(directory, "meta", config, stack_layers(config, layers), files, ignored, release)


def rank_files(directory: Path) -> list[Path]:
    """Returns the files of all ranks in order.

    Raises:
        FileNotFoundError: there is none, or a number in the row is missing.
    """
    found = {
        int(m[1]): path
        for path in directory.glob("*.pth")
        if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    if not found:
        raise FileNotFoundError(f"no consolidated.*.pth in {directory}")
    if absent := sorted(set(range(max(found) + 1)) - set(found)):
        raise FileNotFoundError(f"consolidated.{absent[0]:02d}.pth is missing in {directory}; fetch it again")
    return [found[rank] for rank in sorted(found)]


def _share(config: Llama4Config, part: Part, num_ranks: int) -> dict[str, int]:
    """Returns the sizes of a rank's share of a parameter."""
    sizes = names.part_sizes(config, part.path)
    if not part.split:
        return sizes
    whole = sizes[part.split]
    if whole % num_ranks:
        raise ValueError(f"{num_ranks} ranks cannot share {whole} of {part.path}; a consolidated.*.pth file is missing")
    return sizes | {part.split: whole // num_ranks}


def _read_scales(directory: Path, num_ranks: int, maps: list[MappedFile]) -> list[dict[str, np.ndarray]]:
    scales = []
    for rank in range(num_ranks):
        path = directory / f"fp8_scales_{rank}.pt"
        if path.is_file():
            content, mapped = read_pth(path)
            scales.append(content)
            maps.append(mapped)
    if scales and len(scales) < num_ranks:
        raise FileNotFoundError(f"{len(scales)} files fp8_scales_*.pt for {num_ranks} ranks in {directory}; fetch them")
    return scales


def _piece(file: str, key: str, view: np.ndarray, scales: list[dict[str, np.ndarray]], rank: int) -> LazyArray:
    if view.dtype.itemsize > 1:
        return View(view)
    prefix, _, name = key.rpartition(".")
    scale_key = f"{prefix}.{_EXPERT_NAMES.get(name, name)}"
    if not scales or not isinstance(scales[rank].get(scale_key), np.ndarray):
        raise ValueError(f"{file}: {key} is {view.dtype}, and fp8_scales_{rank}.pt has no {scale_key}")
    # Quantised as [E, out, in] with a scale for each (expert, out); stored as [E, in, out].
    scale = scales[rank][scale_key].reshape(view.shape[0], 1, view.shape[2])
    return Scaled(view.view(ml_dtypes.float8_e4m3fn), scale, np.dtype(ml_dtypes.bfloat16))
