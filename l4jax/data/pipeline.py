"""From streams of documents to batches: mix by weight, encode in worker processes, pack, and go on exactly.

Everything before packing is a function of a place in a stream, so worker processes only compute ahead. The state is a
few whole numbers: how far each stream is drawn, the mixture since its last change, and the places of the documents in
rows that are not yet given out; those are read again when a run goes on. So it continues bit for bit in the middle of a
pass and of a row, with any number of workers, and with other weights or sources if that is wanted. With another number
of shards (processes that train together) it cannot go on, because each has drawn its own part, and says so.
"""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import absl.flags
import grain

from l4jax.data.encode import Encoder, Example, Skipped
from l4jax.data.packing import Batch, Packed, Packer, Place, Row, make_batch

NAMED_SKIPPED = 10  # documents left out that are named one by one; then the count is said at powers of ten
DOCUMENTS_AT_ONCE = 16  # sent by a worker together: a message between processes costs as much as a short document
MESSAGES_AHEAD = 4  # of each worker

# Grain would pass larger arrays through /dev/shm, of which containers have little; when it is full, workers die of a
# bus error.
NO_SHARED_MEMORY = grain.experimental.DatasetOptions(min_shm_size=1 << 62)

Encoded = list[Example] | Skipped


@dataclass(frozen=True)
class Stream:
    """One component of a mixture."""

    documents: grain.MapDataset
    """`Document`s, or `Skipped` in place of those that cannot be read; usually endless."""
    weight: float
    """Documents drawn from it, relative to the other streams."""
    length: int
    """Documents of its source; a run goes on only if the number has not changed."""


class PackedBatches(grain.IterDataset):
    """Batches of packed rows; their iterator's state is JSON."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        encoder: Encoder,
        *,
        rows: int,
        num_workers: int = 0,
        shard: tuple[int, int] = (0, 1),
    ):
        """Describes the batches; nothing is read before iteration.

        Args:
          streams: by name; the order gives their numbers in `source_ids`.
          encoder: knows the room in a row.
          rows: B, of this shard.
          num_workers: processes that encode ahead; with 0 the caller's process does it.
          shard: number of this process, from 0, and of all that train together; each draws every n-th document.
        """
        super().__init__()
        self.streams, self.encoder, self.rows = dict(streams), encoder, rows
        self.num_workers, self.shard = num_workers, shard

    def __iter__(self) -> "PackedBatchIterator":
        return PackedBatchIterator(self)

    def encoded(self, name: str) -> grain.MapDataset:
        """Returns this shard's part of a stream as `Encoded`."""
        index, count = self.shard
        return self.streams[name].documents.map(self.encoder)[index::count]


class PackedBatchIterator(grain.DatasetIterator):
    """Made by `PackedBatches`."""

    def __init__(self, data: PackedBatches):
        super().__init__()
        self._data = data
        self._encoded = {name: data.encoded(name) for name in data.streams}
        self._ids = {name: number for number, name in enumerate(data.streams, start=1)}
        self._weights = {name: float(stream.weight) for name, stream in data.streams.items() if stream.weight}
        self._reader: grain.DatasetIterator | None = None
        self._begin(dict.fromkeys(data.streams, 0), skipped=0)

    def _begin(self, taken: dict[str, int], skipped: int) -> None:
        """Starts a mixture after `taken` documents of each stream."""
        self._taken, self._skipped = taken, skipped
        self._mixed_from, self._drawn = dict(taken), 0
        self._packer = Packer(self._data.encoder.row_tokens, self._data.encoder.row_tiles)
        self._closed: deque[Row] = deque()
        self._ahead: deque[tuple[str, int, Encoded]] = deque()
        self._close_reader()

    def __next__(self) -> Batch:
        rows = self._data.rows
        while len(self._closed) < rows:
            try:
                name, index, encoded = self._next_document()
            except StopIteration:
                self._closed.extend(self._packer.close_all())
                break
            self._drawn += 1
            self._taken[name] = index + 1
            if isinstance(encoded, Skipped):
                self._skip(encoded)
                continue
            for piece, example in enumerate(encoded):
                closed = self._packer.add(Packed((name, index, piece), self._ids[name], example))
                if closed is not None:
                    self._closed.append(closed)
        if not self._closed:
            raise StopIteration
        vision, encoder = self._data.encoder.processor.vision_config, self._data.encoder
        taken = [self._closed.popleft() for _ in range(min(rows, len(self._closed)))]
        return make_batch(taken, rows, encoder.row_tokens, encoder.row_tiles, vision.image_size if vision else 0)

    # --- Reading ----------------------------------------------------------------------------------------------------

    def _next_document(self) -> tuple[str, int, Encoded]:
        if not self._ahead:
            self._reader = self._reader or self._open_reader()
            self._ahead.extend(next(self._reader))
        return self._ahead.popleft()

    def _open_reader(self) -> grain.DatasetIterator:
        """Returns an iterator over lists of (stream, index, encoded), from the next document on."""
        parts = [
            self._encoded[name].map_with_index(_Labelled(name))[self._mixed_from[name] :] for name in self._weights
        ]
        mixed = grain.MapDataset.mix(parts, list(self._weights.values()))[self._drawn :]
        workers = self._data.num_workers
        groups = mixed.batch(DOCUMENTS_AT_ONCE if workers else 1, batch_fn=list)
        read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        dataset = groups.to_iter_dataset(read)
        if workers:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # grain hands its flags to the workers, and insists on it
            dataset = grain.experimental.WithOptionsIterDataset(dataset, NO_SHARED_MEMORY)
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=MESSAGES_AHEAD)
            )
        return iter(dataset)

    def _skip(self, skipped: Skipped) -> None:
        self._skipped += 1
        if self._skipped <= NAMED_SKIPPED:
            warnings.warn(f"left out: {skipped.reason}", stacklevel=3)
        elif str(self._skipped).strip("0") == "1":
            warnings.warn(f"left out {self._skipped:,} documents so far; l4jax data names them", stacklevel=3)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def close(self) -> None:
        """Ends the worker processes."""
        self._close_reader()
        super().close()

    # --- State ------------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Returns where the batches go on, as plain values that JSON takes."""
        return {
            "shard": list(self._data.shard),
            "lengths": {name: stream.length for name, stream in self._data.streams.items()},
            "weights": dict(self._weights),
            "mixed_from": dict(self._mixed_from),
            "drawn": self._drawn,
            "taken": dict(self._taken),
            "skipped": self._skipped,
            "closed": [_places(row) for row in self._closed],
            "open": [_places(row) for row in self._packer.rows],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state, also one of other weights, other sources or another number of workers.

        Sources that are new begin at their beginning; documents of a source that is gone leave the rows that wait.

        Raises:
          ValueError: the state is of another number of shards, or a source has another number of documents now.
        """
        self._check(state)
        self._begin({name: state["taken"].get(name, 0) for name in self._data.streams}, state["skipped"])
        if state["weights"] == self._weights:
            # The same mixture goes on; another begins where the old one ends.
            self._mixed_from = {name: state["mixed_from"].get(name, 0) for name in self._data.streams}
            self._drawn = state["drawn"]
        for places in state["closed"]:
            row = Row(self._data.encoder.row_tokens, self._data.encoder.row_tiles)
            for packed in self._read_again(places):
                row.add(packed)
            self._closed.append(row)
        for places in state["open"]:
            self._packer.open_row(self._read_again(places))

    def _check(self, state: dict[str, Any]) -> None:
        shard, saved = self._data.shard, tuple(state["shard"])
        if saved != shard:
            raise ValueError(
                f"the place in the data was saved by process {saved[0] + 1} of {saved[1]}, this is process "
                f"{shard[0] + 1} of {shard[1]}; each reads its own part, so go on with {saved[1]} processes, or start "
                "anew"
            )
        changed = [
            f"{name} had {state['lengths'][name]:,} documents and has {stream.length:,} now"
            for name, stream in self._data.streams.items()
            if state["lengths"].get(name, stream.length) != stream.length
        ]
        if changed:
            raise ValueError(
                f"the data have changed since the run was saved: {'; '.join(changed)}; bring the old files back, or "
                "give the new ones another name under data.sources"
            )

    def _read_again(self, places: Sequence[Place]) -> list[Packed]:
        packed = []
        for name, index, piece in places:
            if name in self._encoded:
                encoded = self._encoded[name][index]
                packed.append(Packed((name, index, piece), self._ids[name], encoded[piece]))
        return packed


@dataclass(frozen=True)
class _Labelled:
    """Puts the name of the stream and the place in it beside an element."""

    name: str

    def __call__(self, index: int, element: Encoded) -> tuple[str, int, Encoded]:
        return self.name, index, element


def _places(row: Row) -> list[list[Any]]:
    return [list(packed.place) for packed in row.documents]
