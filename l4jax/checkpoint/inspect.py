"""`l4jax inspect`: what a checkpoint holds, from headers alone and without jax; every byte with `--verify`."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4jax.checkpoint import manifest, store, zarr
from l4jax.checkpoint.lazy import Index, LazyArray, bits_dtype, boxes
from l4jax.checkpoint.names import layer_shapes
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.pieces import WORKERS, progress
from l4jax.checkpoint.pth import read_pth
from l4jax.checkpoint.safetensors import read_header
from l4jax.checkpoint.source import Source, read_json
from l4jax.config import Llama4Config

KINDS = {"hf": "Hugging Face", "meta": "Meta", "l4jax": "l4jax (Orbax)"}


@dataclass(frozen=True)
class Entry:
    """One array of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.num_values * self.dtype.itemsize


# --- What is there ------------------------------------------------------------------------------------------------


def entries_of_source(source: Source) -> list[Entry]:
    return [Entry(path, tuple(array.shape), array.dtype) for path, array in sorted(source.arrays.items())]


def entries_of_file(path: Path) -> list[Entry]:
    """Returns the tensors of one .safetensors or .pth file, as they are named there."""
    if path.suffix == ".safetensors":
        return [Entry(name, info.shape, info.dtype) for name, info in read_header(path).items()]
    if path.suffix in (".pth", ".pt"):
        content, _ = read_pth(path)
        return [Entry(name, t.shape, t.dtype) for name, t in content.items() if isinstance(t, np.ndarray)]
    raise ValueError(f"{path} is no .safetensors and no .pth file; give a file of these or a checkpoint directory")


def orbax_directory(path: Path) -> Path | None:
    """Returns the directory of arrays in an Orbax checkpoint: itself, its `params` or `state`, or its newest step."""
    for candidate in (path, path / "params", path / "state", path / "default"):
        if (candidate / "_METADATA").is_file():
            return candidate
    steps = sorted((int(p.name), p) for p in path.iterdir() if p.is_dir() and p.name.isdigit())
    return orbax_directory(steps[-1][1]) if steps else None


def entries_of_orbax(directory: Path) -> list[Entry]:
    """Returns the arrays that Orbax wrote, in any of its layouts."""
    metadata, entries = read_json(directory / "_METADATA"), []
    for entry in metadata["tree_metadata"].values():
        name = ".".join(str(part["key"]) for part in entry["key_metadata"])
        if entry["value_metadata"].get("skip_deserialize"):
            continue
        array = zarr.open_orbax_array(directory, name, metadata)
        entries.append(Entry(name, tuple(array.shape), array.dtype))
    return entries


def summary(path: Path) -> dict:
    """Returns everything that headers tell, ready for JSON.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is damaged, or tensors and config do not fit.
    """
    path = Path(path)
    if path.is_file():
        return {"path": str(path), "kind": f"file ({path.suffix})", **_totals(entries_of_file(path))}
    try:
        source = open_checkpoint(path)
    except FileNotFoundError:
        if path.is_dir() and (directory := orbax_directory(path)) and not (path / manifest.MANIFEST).is_file():
            return {"path": str(directory), "kind": "Orbax", **_totals(entries_of_orbax(directory))}
        raise
    return {
        "path": str(path),
        "kind": KINDS[source.kind],
        **({"quantize": source.quantize} if source.quantize else {}),
        **_totals(entries_of_source(source)),
        "active_parameters": active_parameters(source.config),
        "files": len(source.weight_files),
        "file_bytes": sum(file.stat().st_size for file in source.weight_files),
        "model": describe(source.config),
        "companions": [name for name in store.COMPANIONS if (path / name).is_file()],
        "legal": [file.name for file in store.legal_files(path)],
        "ignored": source.ignored,
        "config": source.config.to_hf(),
    }


def _totals(entries: list[Entry]) -> dict:
    dtypes = Counter()
    for entry in entries:
        dtypes[entry.dtype.name] += entry.num_values
    return {
        "parameters": sum(entry.num_values for entry in entries if not entry.name.endswith(".scales")),
        "bytes": sum(entry.size for entry in entries),
        "arrays": len(entries),
        "dtypes": dict(dtypes),
        "tree": [{"name": entry.name, "shape": list(entry.shape), "dtype": entry.dtype.name} for entry in entries],
    }


def active_parameters(config: Llama4Config) -> int:
    """Returns how many text parameters one token meets: of the routed experts only the chosen ones."""
    text, total = config.text_config, 0
    for path, shape in layer_shapes(config).items():
        if path.startswith(("vision_model.", "multi_modal_projector.")):
            continue
        size = math.prod(shape)
        if ".feed_forward.experts." in path:
            size = size // text.num_local_experts * text.num_experts_per_tok
        total += size
    return total


def describe(config: Llama4Config) -> dict[str, str]:
    """Returns the model in a few lines of words."""
    text, vision = config.text_config, config.vision_config
    chunk = f"chunks of {text.attention_chunk_size:,}" if text.attention_chunk_size else "full attention"
    kinds = [
        f"{'rope' if text.uses_rope(layer) else 'NoPE'}+{'experts' if text.uses_experts(layer) else 'dense'}"
        for layer in range(text.cycle_length)
    ]
    lines = {
        "text": f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} query and "
        f"{text.num_key_value_heads} key heads of {text.head_dim}, vocabulary {text.vocab_size:,}",
        "layers": f"{', '.join(kinds)} (period {text.cycle_length})",
        "attention": f"{chunk} in rope layers, context {text.max_position_embeddings:,}, "
        f"QK norm {'on' if text.use_qk_norm else 'off'}",
    }
    if text.moe_layers:
        lines["experts"] = (
            f"{text.num_local_experts} of width {text.intermediate_size}, {text.num_experts_per_tok} a token and one "
            f"shared, in {len(text.moe_layers)} layers"
        )
    if vision:
        lines["vision"] = (
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, tiles of {vision.image_size} pixels, "
            f"{vision.tokens_per_tile} tokens a tile"
        )
    return lines


# --- Every byte ---------------------------------------------------------------------------------------------------


def sealed_directories(path: Path) -> list[Path]:
    """Returns the directories with a manifest: the checkpoint itself, or the steps of a training run."""
    if (path / manifest.MANIFEST).is_file():
        return [path]
    return sorted(file.parent for file in path.glob(f"*/{manifest.MANIFEST}"))


def verify_files(directory: Path) -> list[str]:
    """Compares every file with the manifest; returns one line for each that differs, is missing or is not listed."""
    files = manifest.read_manifest(directory)["files"]

    def check(name: str) -> str | None:
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != files[name]["size"]:
            return f"{name} has {size} bytes, expected {files[name]['size']}"
        return None if manifest.sha256(path) == files[name]["sha256"] else f"{name} was changed: its sha256 differs"

    problems = []
    with progress("hashing", sum(f["size"] for f in files.values())) as advance, ThreadPoolExecutor(WORKERS) as pool:
        for name, problem in zip(files, pool.map(check, files), strict=True):
            advance(files[name]["size"])
            problems += [problem] if problem else []
    problems += [f"{name} is not in the manifest" for name in manifest.content_files(directory) if name not in files]
    return problems


def count_non_finite(source: Source) -> dict[str, tuple[int, int]]:
    """Returns path -> (NaN, infinite values), for arrays that have any."""
    counts: Counter = Counter()
    for path, values in _walk(source, source.arrays, "reading", lambda path, box: source.arrays[path].read(box)):
        nan, infinite = non_finite(values)
        counts[path, 0] += nan
        counts[path, 1] += infinite
    return {p: (counts[p, 0], counts[p, 1]) for p in source.arrays if counts[p, 0] or counts[p, 1]}


def non_finite(values: np.ndarray) -> tuple[int, int]:
    """Returns the numbers of NaN and of infinite values; by their bits, as numpy is slow with bfloat16."""
    exponents = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
    if values.dtype.name not in exponents:
        return int(np.isnan(values.astype(np.float32)).sum()), 0
    bits, exponent = values.view(bits_dtype(values.dtype)), exponents[values.dtype.name]
    magnitude = bits & bits.dtype.type((1 << (8 * values.dtype.itemsize - 1)) - 1)
    return int(np.count_nonzero(magnitude > exponent)), int(np.count_nonzero(magnitude == exponent))


def difference(first: Source, second: Source) -> list[str]:
    """Returns one line for each parameter that is not in both, or differs in shape, dtype or any bit."""
    lines = []
    common = {}
    for path in sorted(set(first.arrays) | set(second.arrays)):
        if path not in second.arrays or path not in first.arrays:
            lines.append(f"{path}: only in {(first if path in first.arrays else second).directory}")
            continue
        one, other = first.arrays[path], second.arrays[path]
        if tuple(one.shape) != tuple(other.shape):
            lines.append(f"{path}: shape {list(one.shape)} and {list(other.shape)}")
            continue
        if one.dtype != other.dtype:
            lines.append(f"{path}: {one.dtype} and {other.dtype}")
        common[path] = one

    changed: dict[str, tuple[int, float]] = {}

    def compare(path: str, box: Index) -> tuple[int, float]:
        one, other = first.arrays[path].read(box), second.arrays[path].read(box)
        if one.dtype == other.dtype:
            bits = bits_dtype(one.dtype)
            if not (count := int(np.count_nonzero(one.view(bits) != other.view(bits)))):
                return 0, 0.0
        else:
            count = int(np.count_nonzero(one.astype(np.float32) != other.astype(np.float32)))
        gap = np.abs(one.astype(np.float32) - other.astype(np.float32))
        second.release()
        return count, float(gap.max())

    for path, (count, gap) in _walk(first, common, "comparing", compare):
        if count:
            before = changed.get(path, (0, 0.0))
            changed[path] = (before[0] + count, max(before[1], gap))
    for path, (count, gap) in changed.items():
        total = math.prod(common[path].shape)
        lines.append(f"{path}: {count:,} of {total:,} values differ, by at most {gap:.6g}")
    return lines


def _walk(
    source: Source, arrays: Mapping[str, LazyArray], title: str, read: Callable[[str, Index], object]
) -> Iterator[tuple[str, object]]:
    """Yields (path, read(path, box)) for all boxes of all arrays; several threads read, memory stays bounded."""

    def one(work: tuple[str, Index]) -> tuple[str, object, int]:
        path, box = work
        result = read(path, box)
        source.release()
        size = math.prod(part.stop - part.start for part in box) * arrays[path].dtype.itemsize
        return path, result, size

    todo = [
        (path, box)
        for path, array in arrays.items()
        for box in boxes(array.shape, zarr.source_friendly_piece(path, array.shape, array.dtype.itemsize))
    ]
    total = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays.values())
    with progress(title, total) as advance, ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(todo), WORKERS):
            for path, result, size in pool.map(one, todo[start : start + WORKERS]):
                advance(size)
                yield path, result


# --- Command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="checkpoint directory of any format, or one .safetensors or .pth file")
    parser.add_argument("--tree", action="store_true", help="list every array")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verify", action="store_true", help="read every byte: checksums, NaN and infinite values")
    parser.add_argument("--diff", metavar="OTHER", help="compare every value with another checkpoint of any format")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 when `--verify` finds damage or `--diff` a difference."""
    path = Path(args.path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint directory or file")
    report, problems = {}, []
    if args.verify and (sealed := sealed_directories(path)):
        # Before anything else is believed: a damaged file may not even open.
        found = {folder: verify_files(folder) for folder in sealed}
        problems = [line if folder == path else f"{folder.name}/{line}" for folder in sealed for line in found[folder]]
        report["damaged"] = problems
    if not problems:
        report = summary(path) | report
        if args.verify and "config" in report:
            found = count_non_finite(open_checkpoint(path))
            report["non_finite"] = {name: {"nan": nan, "inf": inf} for name, (nan, inf) in found.items()}
            problems = [f"{name} has {nan:,} NaN and {inf:,} infinite values" for name, (nan, inf) in found.items()]
        if args.diff:
            report["differences"] = difference(open_checkpoint(path), open_checkpoint(Path(args.diff)))
            problems = problems + report["differences"]
    if args.json:
        print(json.dumps(report if args.tree else {k: v for k, v in report.items() if k != "tree"}, indent=1))
    else:
        print("\n".join([*_lines(report, args), *problems]))
    return 1 if problems else 0


def _lines(report: dict, args: argparse.Namespace) -> list[str]:
    """Returns the report for people."""
    if "kind" not in report:
        return [f"{args.path}: damaged"]
    lines = [
        f"{report['path']}: {report['kind']} checkpoint",
        f"parameters   {report['parameters']:,} in {report['arrays']:,} arrays, {report['bytes'] / 1e9:,.2f} GB",
        f"dtypes       {', '.join(f'{name} {count:,}' for name, count in report['dtypes'].items())}",
    ]
    if "quantize" in report:
        lines.append(f"quantised    {report['quantize']}: experts and linears of the text layers, with float32 scales")
    if "model" in report:
        lines[1] += f"; {report['active_parameters']:,} active for a text token"
        lines += [f"{name:<12} {line}" for name, line in report["model"].items()]
        lines.append(f"files        {report['files']:,} of weights, {report['file_bytes'] / 1e9:,.2f} GB")
        lines.append(f"companions   {', '.join(report['companions']) or 'none: no tokenizer here'}")
        lines.append(f"licence      {', '.join(report['legal']) or 'no licence file'}")
        lines += [
            f"ignored      {len(report['ignored'])} tensors: {why}" for why in sorted({*report["ignored"].values()})
        ]
    if args.tree:
        width = max(len(entry["name"]) for entry in report["tree"])
        lines += [f"{e['name']:<{width}}  {e['dtype']:<9} {'x'.join(map(str, e['shape']))}" for e in report["tree"]]
    if args.verify and "damaged" in report:
        lines.append("verified     every file has the sha256 of the manifest")
    elif args.verify:
        lines.append("verified     no manifest here, so no checksums to compare")
    if args.verify and report.get("non_finite") == {}:
        lines.append("values       all finite")
    if args.diff and not report["differences"]:
        lines.append(f"difference   none: every bit equals {args.diff}")
    return lines
