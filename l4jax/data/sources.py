"""Documents at random: `len(source)` and `source[i]`, from JSONL, Parquet and TFDS directories.

A source reads nothing but what it is asked for, and pickles as little more than its path, for worker processes.
`source[i]` raises DocumentError, which names file and line, when the i-th document is not of the schema.
"""

import bisect
import contextlib
import hashlib
import itertools
import os
import tempfile
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from l4jax.data.schema import Document, DocumentError, PictureFiles, parse_document, parse_line

BLOCK_BYTES = 1 << 24  # of a file, read at once in search of line ends
MAX_LINE_BYTES = 1 << 28  # of one document; a longer line is a file of another kind
KEPT_ROW_GROUPS = 2  # of a Parquet file, decoded, in every process
HEAVY_ROW_GROUP = 1 << 26  # bytes; where each document costs the reading of this much, a line says so


class Source(Protocol):
    """A sequence of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


def open_source(
    path: str | Path, *, split: str = "train", picture_dir: str | Path | None = None, cache_dir: Path | None = None
) -> Source:
    """Opens a JSONL or Parquet file, a directory with files of one of these kinds, or a TFDS directory.

    Args:
        path: what to open.
        split: of a TFDS directory.
        picture_dir: see `SourceConfig`.
        cache_dir: where the line index of a JSONL file is kept; it is made anew for each process if None.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is none of these, or is damaged.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path, picture_dir, cache_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"no data at {path}; give a JSONL or Parquet file, or a directory of them")
    if (path / "dataset_info.json").is_file():
        return TfdsSource(path, split)
    files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet"))
    if files:
        return JoinedSource([_open_file(file, picture_dir, cache_dir) for file in files])
    data_sets = sorted(info.parent for depth in ("*", "*/*") for info in path.glob(f"{depth}/dataset_info.json"))
    if len(data_sets) == 1:
        return TfdsSource(data_sets[0], split)
    if data_sets:
        raise ValueError(f"{path} holds {len(data_sets)} TFDS data sets; name one of them, such as {data_sets[0]}")
    found = sorted({p.suffix or p.name for p in path.iterdir()})[:8]
    raise ValueError(
        f"no documents in {path} (found {', '.join(found) or 'nothing'}); expected *.jsonl, *.parquet or a TFDS "
        "directory with dataset_info.json"
    )


def _open_file(path: Path, picture_dir: str | Path | None, cache_dir: Path | None) -> Source:
    if path.suffix == ".parquet":
        return ParquetSource(path, picture_dir)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return JsonlSource(path, picture_dir, cache_dir)
    packed = path.suffix in (".gz", ".zst", ".xz", ".bz2")
    mend = "unpack it, its lines cannot be read at random" if packed else "its name must end with one of these"
    raise ValueError(f"{path} is neither .jsonl nor .parquet; {mend}")


class JoinedSource:
    """Sources one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


# --- JSONL ----------------------------------------------------------------------------------------------------------


class JsonlSource:
    """The lines of a file that are not empty."""

    def __init__(self, path: str | Path, picture_dir: str | Path | None = None, cache_dir: Path | None = None):
        self._path, self._cache_dir = Path(path), cache_dir
        self._pictures = PictureFiles.beside(self._path, picture_dir)
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._index = _cached_index(self._path, self._cache_dir) if self._cache_dir else line_index(self._path)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_file", "_index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Document:
        start, end, number = self._index[index].tolist()
        where = f"{self._path}:{number}"
        if end - start > MAX_LINE_BYTES:
            raise DocumentError(
                f"{where}: a line of {end - start:,} bytes, more than {MAX_LINE_BYTES:,}, is no document"
            )
        # pread moves no common file position, so threads do not disturb each other.
        return parse_line(os.pread(self._file, end - start, start), where, self._pictures)


def line_index(path: Path) -> Int[np.ndarray, "n 3"]:
    """Returns begin, end (bytes) and number (from 1) of each line that is not empty."""
    ends = []
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            offset = file.tell() - len(block)
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset)
        size = file.tell()
    ends = np.concatenate([*ends, [size]]).astype(np.int64)  # what follows the last line end is a line too
    begins = np.concatenate([[0], ends[:-1] + 1])
    lines = np.stack([begins, ends, np.arange(1, len(ends) + 1)], axis=1)
    filled = ends > begins
    short = np.flatnonzero(ends - begins == 1)  # a lone carriage return is an empty line of Windows
    if len(short):
        with path.open("rb") as file:
            for line in short:
                file.seek(begins[line])
                filled[line] = file.read(1) != b"\r"
    return lines[filled]


def _cached_index(path: Path, directory: Path) -> Int[np.ndarray, "n 3"]:
    """Returns the line index from a file in `directory`, which it writes if the data are new or have changed."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    file = directory / f"{path.stem}-{key}.lines.npy"
    if not file.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".npy", delete=False) as temporary:
            np.save(temporary, line_index(path))
        os.replace(temporary.name, file)  # whole or not at all, also when several processes write it
    return np.load(file, mmap_mode="r")


# --- Parquet --------------------------------------------------------------------------------------------------------


class ParquetSource:
    """The rows of a file; columns are named as the fields of the schema. A row group is read whole."""

    def __init__(self, path: str | Path, picture_dir: str | Path | None = None):
        self._path = Path(path)
        self._pictures = PictureFiles.beside(self._path, picture_dir)
        self._open()
        metadata = self._file.metadata
        heaviest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
        if heaviest > HEAVY_ROW_GROUP and metadata.num_row_groups > KEPT_ROW_GROUPS:
            warnings.warn(
                f"{self._path} has row groups of {heaviest / 2**20:,.0f} MiB, and each document taken at random costs "
                "the reading of one; write it anew with a smaller row_group_size, or by l4jax data --write",
                stacklevel=2,
            )

    def _open(self) -> None:
        import pyarrow.parquet  # paid by those who have such files
        from pyarrow import ArrowException

        try:
            self._file = pyarrow.parquet.ParquetFile(self._path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{self._path} is damaged or no Parquet file: {' '.join(str(error).split())}") from None
        groups = range(self._file.num_row_groups)
        self._ends = list(itertools.accumulate(self._file.metadata.row_group(group).num_rows for group in groups))
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_pictures": self._pictures}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        where = f"{self._path}:row {index + 1}"
        try:
            data = self._read(group).slice(row, 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # pyarrow's errors are of these two kinds
            raise DocumentError(f"{where}: the file is damaged: {' '.join(str(error).split())}") from None
        return parse_document(data, where, self._pictures)

    def _read(self, group: int) -> Any:
        if group not in self._groups:
            self._groups[group] = self._file.read_row_group(group, use_threads=False)
            if len(self._groups) > KEPT_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


# --- TFDS -----------------------------------------------------------------------------------------------------------


class TfdsSource:
    """The examples of one split: a feature `document` with the JSON of the schema, or `text` and what belongs to it."""

    def __init__(self, directory: str | Path, split: str = "train"):
        import tensorflow_datasets as tfds

        self._where = f"{directory}[{split}]"
        builder = tfds.builder_from_directory(directory)
        if builder.info.file_format.value not in ("array_record", "parquet"):
            raise ValueError(
                f"{directory} holds {builder.info.file_format.value} files, which cannot be read at random; build it "
                'with file_format="array_record"'
            )
        features = sorted(builder.info.features or ())
        if not {"document", "text"} & set(features):
            raise ValueError(
                f"{directory} has the features {', '.join(features)}; expected document (the JSON of the schema, as "
                "l4jax data --write makes it) or text"
            )
        try:
            self._examples = builder.as_data_source(split)
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"{directory} has no split {split!r}; it has {splits} ({_one_line(error)})") from None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Document:
        where = f"{self._where}:{index + 1}"
        example = self._examples[index]
        if "document" in example:
            return parse_line(example["document"], where)
        return parse_document({name: _plain(value) for name, value in example.items()}, where)


def _plain(value: Any) -> Any:
    """Returns a value of TFDS as JSON would have it."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
