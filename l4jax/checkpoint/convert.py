"""`l4jax convert`: Hugging Face or Meta weights to an l4jax checkpoint, and any of them to Hugging Face.

The work is cut into pieces of at most 64 MiB that threads read, transpose and write; memory does not depend on the
model. It goes on in `DESTINATION.partial` until everything is there and hashed, then gets its name.
"""

import argparse
import json
import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from l4jax.checkpoint import manifest, names, store, zarr
from l4jax.checkpoint.lazy import Index, LazyArray, boxes, read_into
from l4jax.checkpoint.opening import open_checkpoint
from l4jax.checkpoint.outputs import QUANTIZE, Output, bytes_needed, outputs
from l4jax.checkpoint.pieces import JOURNAL, Journal, Piece, check_space, work
from l4jax.checkpoint.safetensors import encode_header
from l4jax.checkpoint.source import Source
from l4jax.host import keep_freed_memory

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32")}
SHARD_BYTES = 5_000_000_000
"""Largest safetensors file of an export, unless one tensor is larger; what Hugging Face recommends."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "l4jax",
    dtype: str | None = None,
    quantize: str | None = None,
) -> Path:
    """Writes the checkpoint `source` (any format) as `destination`. Interrupted, the same call goes on.

    Args:
        to: "l4jax" or "hf".
        dtype: "bfloat16", "float16" or "float32"; None keeps the dtype of each parameter (bfloat16 where it is FP8).
        quantize: one of QUANTIZE, for experts and linears of the text layers (`l4jax.model.quant`); `dtype` is then
            that of the rest. Only to l4jax.

    Raises:
        FileNotFoundError: the source lacks files.
        FileExistsError: the destination is taken, or its `.partial` belongs to other work.
        ValueError: the source is damaged or does not fit its config.
        OSError: the disk is full or not writable.
    """
    if quantize and to != "l4jax":
        raise ValueError(f"quantize={quantize!r} is for l4jax checkpoints, not for {to}; leave one of the two out")
    opened, destination = open_checkpoint(source), Path(destination)
    if opened.quantize is not None:
        raise ValueError(
            f"{source} is quantised to {opened.quantize}, and what was rounded off is lost; "
            "convert the checkpoint that it was made from"
        )
    if destination.exists():
        raise FileExistsError(f"{destination} is there already; remove it or choose another name")
    partial = store.partial_directory(destination)
    parent = next(folder for folder in (destination.absolute(), *destination.absolute().parents) if folder.is_dir())
    wanted = DTYPES[dtype] if dtype else None
    written = outputs(opened.config, opened.arrays, wanted, quantize)
    needed = bytes_needed(written)
    present = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    check_space(parent, int(needed * 1.001) + (16 << 20) - present)

    job = {"source": opened.identity(), "to": to, "dtype": dtype, "quantize": quantize, "format": manifest.FORMAT}
    with Journal(partial, job) as journal:
        if to == "l4jax":
            known = _write_l4jax(opened, partial, written, journal)
        else:
            known = _write_hf(opened, partial, wanted, journal)
    store.copy_companions(opened.directory, partial)
    facts = {
        "converted_from": opened.kind,
        "dtype": dtype or "as in the source",
        **({"quantize": quantize} if quantize else {}),
        "left_out": opened.ignored,
        "written": time.strftime("%Y-%m-%d"),
    }
    manifest.write_manifest(partial, facts, known)
    store.finish(partial, destination)
    (destination / JOURNAL).unlink()
    return destination


# --- To l4jax -----------------------------------------------------------------------------------------------------


def _write_l4jax(source: Source, directory: Path, written: Mapping[str, Output], journal: Journal) -> dict[str, str]:
    """Writes arrays and config; returns sha256 by file name."""
    params = directory / "params"
    params.mkdir(exist_ok=True)
    pieces, files, all_targets = [], {}, []
    for path, output in written.items():
        shape, targets = output.create(params, path)
        all_targets += targets
        for box in boxes(output.array.shape, shape):
            held = [zarr.piece_file(params, target, shape, box) for target in targets]

            def write(output=output, targets=targets, box=box, held=held) -> str:
                for target, (place, values) in zip(targets.values(), output.read(box), strict=True):
                    zarr.write_box(target, place, values)
                source.release()
                return _checksum(held)

            def checksum(held=held) -> str | None:
                return _checksum(held) if all(file.is_file() for file in held) else None

            size = round(math.prod(part.stop - part.start for part in box) * output.bytes_per_value)
            order = (path.rpartition("experts.")[0] or path, [part.start for part in box], path)
            piece = Piece(held[0].relative_to(directory).as_posix(), size, write, checksum)
            files[piece.name] = [file.relative_to(directory).as_posix() for file in held]
            pieces.append((order, piece))
    # Gate and up lie side by side in the source, so they are read one after the other.
    work([piece for _, piece in sorted(pieces, key=lambda item: item[0])], journal, "converting")
    zarr.write_orbax_metadata(params, all_targets)
    (directory / "config.json").write_text(json.dumps(source.config.to_hf(), indent=2) + "\n")
    digests = {name: journal.done[name].split() for name in files}
    return {file: digest for name in files for file, digest in zip(files[name], digests[name], strict=True)}


def _checksum(files: list[Path]) -> str:
    """Returns the sha256 of each, in one line."""
    return " ".join(map(manifest.sha256, files))


# --- To Hugging Face ----------------------------------------------------------------------------------------------


def _write_hf(source: Source, directory: Path, dtype: np.dtype | None, journal: Journal) -> dict[str, str]:
    """Writes safetensors, index and config; returns sha256 by file name."""
    config = source.config
    rows = names.hf_rows(config, text_prefix="language_model." if config.vision_config else "")
    parts = {row.key: [_layer(source, part.path) for part in row.parts] for row in rows}
    infos = {}
    for row in rows:
        spread = _spread_shape(source, row)
        joined = names.row_shape(row, [names.part_sizes(config, part.path) for part in row.parts])
        infos[row.key] = (dtype or parts[row.key][0].dtype, joined, spread)
    files, places, hashes = group_in_files(infos), {}, {}
    rows = {row.key: row for row in rows}
    for file, keys in files.items():
        head, starts = encode_header({key: infos[key][:2] for key in keys})
        path = directory / file
        path.touch()
        _write_at(path, 0, memoryview(head))
        os.truncate(path, len(head) + sum(_size(*infos[key][:2]) for key in keys))
        hashes[file] = manifest.GrowingHash(path)
        hashes[file].add(0, len(head))
        for key in keys:
            for offset, piece in _tensor_pieces(source, path, rows[key], parts[key], infos[key], starts[key]):
                places[piece] = (hashes[file], offset)
    # One thread hashes behind those that write.
    with ThreadPoolExecutor(1) as hasher:
        hashed = []

        def finished(piece: Piece) -> None:
            growing, offset = places[piece]
            hashed.append(hasher.submit(growing.add, offset, piece.size))

        work(list(places), journal, "exporting", finished)
        for future in hashed:
            future.result()
    known = {file: growing.hexdigest() for file, growing in hashes.items()}
    if len(files) > 1:
        weight_map = {key: file for file, keys in files.items() for key in keys}
        total = sum(_size(*info[:2]) for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    dtypes = {info[0].name for info in infos.values()}
    content = config.to_hf() | {"dtype": dtypes.pop() if len(dtypes) == 1 else "bfloat16"}
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return known


def _layer(source: Source, path: str) -> LazyArray:
    place, position = names.locate(source.config, path)
    return zarr.pick(source.arrays[place], position)


def _spread_shape(source: Source, row: names.Row) -> tuple[int, ...]:
    """Returns the shape of a tensor with its flattened axes apart, its parts joined along the last."""
    sizes = names.part_sizes(source.config, row.parts[0].path)
    shape = [sizes[letter] for letter in names.source_letters(row.parts[0].pattern)]
    return (*shape[:-1], shape[-1] * len(row.parts))


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def group_in_files(infos: Mapping[str, tuple]) -> dict[str, list[str]]:
    """Returns file name -> keys, in order, each file below SHARD_BYTES if its tensors are."""
    groups, filled = [[]], 0
    for key, (dtype, shape, _) in infos.items():
        if groups[-1] and filled + _size(dtype, shape) > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += _size(dtype, shape)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def _tensor_pieces(source, path: Path, row: names.Row, arrays, info: tuple, start: int) -> Iterator[tuple[int, Piece]]:
    """Yields offset and piece: runs of the bytes of one tensor, each made of one box of each parameter in it."""
    dtype, _, spread = info
    piece = zarr.piece_shape(spread, dtype.itemsize)
    for box in boxes(spread, piece):
        first = int(np.ravel_multi_index([part.start for part in box], spread))
        size = math.prod(part.stop - part.start for part in box) * dtype.itemsize
        offset = start + first * dtype.itemsize

        def write(box=box, offset=offset) -> str:
            block = np.empty([part.stop - part.start for part in box], dtype)
            blocks = np.split(block, len(arrays), -1)  # parts of equal size are joined along the last axis, never cut
            for array, part, target in zip(arrays, row.parts, blocks, strict=True):
                whole = box if len(arrays) == 1 else (*box[:-1], slice(0, target.shape[-1]))
                _read_tensor_box(array, part.pattern, whole, target)
            source.release()
            data = memoryview(block.reshape(-1).view(np.uint8))
            _write_at(path, offset, data)
            return f"{zlib.crc32(data):08x}"

        def checksum(offset=offset, size=size) -> str:
            with open(path, "rb") as file:
                file.seek(offset)
                return f"{zlib.crc32(file.read(size)):08x}"

        yield offset, Piece(f"{path.name}@{offset}", size, write, checksum)


def _read_tensor_box(array: LazyArray, pattern: str, box: Index, target: np.ndarray) -> None:
    """Reads the box of a tensor (in its spread axes) from the parameter."""
    letters, order = names.source_letters(pattern), names.target_letters(pattern)
    by_letter = dict(zip(letters, box, strict=True))
    index = tuple(by_letter[letter] for letter in order)
    read_into(array, index, target.transpose([letters.index(letter) for letter in order]))


def _write_at(path: Path, offset: int, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(descriptor)


# --- Command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="directory with Hugging Face, Meta or l4jax weights")
    parser.add_argument("destination", help="directory to write; must not exist")
    parser.add_argument("--to", choices=("l4jax", "hf"), default="l4jax", help="format to write (default: l4jax)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as in the source, bfloat16 for FP8")
    parser.add_argument("--quantize", choices=QUANTIZE, help="experts and linears of the text layers, for inference")


def run(args: argparse.Namespace) -> int:
    keep_freed_memory()
    started = time.monotonic()
    destination = convert(args.source, args.destination, to=args.to, dtype=args.dtype, quantize=args.quantize)
    size = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    print(f"{destination}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s), every file hashed")
    for reason, count in Counter(manifest.read_manifest(destination)["left_out"].values()).items():
        print(f"left out {count} tensors: {reason}")
    print(f"compare every bit with `l4jax inspect {destination} --diff {args.source}`")
    return 0
