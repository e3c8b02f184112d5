"""The manifest of a checkpoint: size and sha256 of every file, written last. Without it a directory is unfinished."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from l4jax.checkpoint.pieces import JOURNAL
from l4jax.checkpoint.source import read_json

MANIFEST = "manifest.json"
FORMAT = "l4jax-checkpoint-1"


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


class GrowingHash:
    """sha256 of a file that is written in any order: what is finished without a gap from its start is hashed at once.

    The bytes are read back while the page cache still has them, so that no second pass over the file is needed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._hash, self._position, self._finished = hashlib.sha256(), 0, {}
        self._buffer = memoryview(bytearray(1 << 20))

    def add(self, offset: int, size: int) -> None:
        """Says that these bytes of the file have their final values. Calls must not overlap."""
        self._finished[offset] = size
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._position)
            while left := self._finished.pop(self._position, 0):
                self._position += left
                while left:
                    read = file.readinto(self._buffer[:left])
                    if not read:
                        raise OSError(f"{self.path} was cut while it was written; convert again")
                    self._hash.update(self._buffer[:read])
                    left -= read

    def hexdigest(self) -> str:
        """Returns the sha256 of the whole file."""
        if self._finished or self._position != self.path.stat().st_size:
            raise ValueError(f"{self.path} is hashed up to byte {self._position} only")
        return self._hash.hexdigest()


def sync(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
