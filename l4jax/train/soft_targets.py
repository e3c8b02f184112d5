"""A teacher's targets kept on disk, one file for each row of a batch, so that a teacher speaks once and is heard often.

A file is named by what the teacher saw, so it serves every run that packs the same row: another student, other
weightings, more passes over the data, a run that goes on. A run whose rows are all there never loads the teacher.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from l4jax.checkpoint.source import Source
from l4jax.sharding import named_sharding, place
from l4jax.train.distill import SoftTargets
from l4jax.train.step import Batch

AXES = {"ids": ("batch", "length", None), "logprobs": ("batch", "length", None), "target": ("batch", "length")}


class CachedTargets:
    """Adds `teacher`, the `SoftTargets`, to the rows of a batch.

    Args:
        directory: where files are kept; several runs and hosts may share it.
        source: the teacher's checkpoint; targets of another one, of another `top_k` or precision lie apart.
        top_k: tokens of each position.
        precision: in which the teacher computes.
        load: loads the teacher's weights; called when a row is missing.
        speak: its targets for placed rows, to be jitted.
        mesh: devices, and `parts`, of which this process feeds one (`sharding.batch_part`).
    """

    def __init__(
        self,
        directory: str,
        source: Source,
        *,
        top_k: int,
        precision: str,
        load: Callable[[], Any],
        speak: Callable[[Any, Batch], SoftTargets],
        mesh: Mesh,
        parts: int,
    ):
        identity = json.dumps([source.identity(), top_k, precision])
        self._directory = epath.Path(directory) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._load, self._weights = load, None
        self._mesh, self._parts = mesh, parts
        self._dtype = np.dtype([("ids", "<i4", top_k), ("logprobs", "<f4", top_k), ("target", "<f4")])

        def speak_by_rows(weights, batch):
            targets = speak(weights, batch)
            of_rows = named_sharding(mesh, ("batch",), batch["ids"].shape[:1])  # each process sees its rows whole
            return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, of_rows), targets)

        self._speak = jax.jit(speak_by_rows)

    def __call__(self, batch: dict[str, np.ndarray], placed: Batch) -> Batch:
        """Returns `placed` with the teacher's targets.

        Args:
            batch: the same rows on the host, this process's part of them.

        Raises:
            ValueError: a file is damaged.
        """
        files = [self._file(batch, row) for row in range(len(batch["ids"]))]
        rows = [self._read(file, batch["ids"].shape[1]) for file in files]
        missing = any(row is None for row in rows)
        if jax.process_count() > 1:
            missing = bool(multihost_utils.process_allgather(np.array(missing)).any())  # all speak, or none
        if missing:
            rows = self._ask(placed)
            for file, row in zip(files, rows, strict=True):
                _write(file, row)
        stored = np.stack(rows)
        arrays = {name: np.ascontiguousarray(stored[name]) for name in AXES}
        return {**placed, "teacher": SoftTargets(**place(arrays, self._mesh, AXES, self._parts))}

    def _file(self, batch: dict[str, np.ndarray], row: int) -> epath.Path:
        seen = hashlib.sha256()
        for name in ("ids", "positions", "segment_ids", "tiles"):
            if batch[name] is not None:
                seen.update(np.ascontiguousarray(batch[name][row]))
        name = seen.hexdigest()
        return self._directory / name[:2] / f"{name}.npy"

    def _read(self, file: epath.Path, length: int) -> np.ndarray | None:
        try:
            with file.open("rb") as opened:
                row = np.load(opened, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}); remove it, and the teacher is asked again") from None
        if row.dtype != self._dtype or row.shape != (length,):
            raise ValueError(f"{file} holds no targets of {length} tokens; remove it, and the teacher is asked again")
        return row

    def _ask(self, placed: Batch) -> list[np.ndarray]:
        if self._weights is None:
            self._weights = self._load()
        targets = self._speak(self._weights, placed)._asdict()
        local = {name: _local_rows(array) for name, array in targets.items()}
        rows = np.empty(local["target"].shape, self._dtype)
        for name, array in local.items():
            rows[name] = array
        return list(rows)


def _local_rows(array: jax.Array) -> np.ndarray:
    """Returns the rows of this process, in order: what `place` would put there."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _write(file: epath.Path, row: np.ndarray) -> None:
    """Writes whole files only: other runs read here."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as opened:
            np.save(opened, row)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
