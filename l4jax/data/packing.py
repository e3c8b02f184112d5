"""Several documents in a row: best fit into a few open rows, and rows to arrays.

A document goes into the open row that it fills best. If it fits into none, the fullest row is closed and a new one is
opened. So rows come one by one, nothing is cut, and what is unfinished can be written down as the places of a few
documents. Room is counted in tokens and in tiles; a row is as full as the scarcer of the two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from l4jax.data.encode import Example, to_numbers

# With 16, rows of documents of any length up to a whole row are 0.95 full (grain's first fit, which closes all rows at
# once: 0.87); with 8, 0.93; with 32, 0.97.
OPEN_ROWS = 16

Place = tuple[str, int, int]
"""Of an example: name of the source, index in its stream, number of the piece."""
Batch = dict[str, np.ndarray | None]
"""`ids`, `positions`, `segment_ids`, `loss_mask`, `source_ids`, `pictures` [B, T]; `tiles` [B, n, 3, S, S], or None
without any.

`segment_ids` counts the documents of a row from 1, `source_ids` the sources of the mixture in the order of the config,
from 1; both are 0 where nothing is. `pictures` is 1 in documents that have some, else 0. Tiles stand beside their row
in the order of its documents; unused ones are 0.
"""


@dataclass(frozen=True, eq=False)
class Packed:
    """An example in a row."""

    place: Place
    source_id: int
    example: Example


@dataclass(eq=False)
class Row:
    """Documents that share a row, and the room that is left."""

    free_tokens: int
    free_tiles: int
    documents: list[Packed] = field(default_factory=list)

    def takes(self, example: Example) -> bool:
        return len(example.ids) <= self.free_tokens and len(example.tiles) <= self.free_tiles

    def add(self, packed: Packed) -> None:
        self.free_tokens -= len(packed.example.ids)
        self.free_tiles -= len(packed.example.tiles)
        self.documents.append(packed)


class Packer:
    """The open rows of a stream of documents."""

    def __init__(self, row_tokens: int, row_tiles: int, open_rows: int = OPEN_ROWS):
        self.row_tokens, self.row_tiles, self._limit = row_tokens, row_tiles, open_rows
        self.rows: list[Row] = []

    def add(self, packed: Packed) -> Row | None:
        """Puts a document into a row; returns the row that was closed to make room, if one was.

        Args:
          packed: no longer than a row.
        """
        taking = [row for row in self.rows if row.takes(packed.example)]
        if taking:
            min(taking, key=self._room).add(packed)
            return None
        closed = self.close_fullest() if len(self.rows) == self._limit else None
        self.open_row([packed])
        return closed

    def open_row(self, documents: Sequence[Packed]) -> None:
        """Opens a row with documents in it; also how saved rows come back."""
        row = Row(self.row_tokens, self.row_tiles)
        for packed in documents:
            row.add(packed)
        self.rows.append(row)

    def close_fullest(self) -> Row:
        """Closes and returns the row with the least room."""
        fullest = min(self.rows, key=self._room)
        self.rows.remove(fullest)
        return fullest

    def close_all(self) -> Iterator[Row]:
        """Closes the rows that are left at the end of the documents, the fullest first."""
        while self.rows:
            yield self.close_fullest()

    def _room(self, row: Row) -> float:
        tokens = row.free_tokens / self.row_tokens
        return min(tokens, row.free_tiles / self.row_tiles) if self.row_tiles else tokens


def make_batch(rows: Sequence[Row], num_rows: int, row_tokens: int, row_tiles: int, tile_size: int) -> Batch:
    """Returns rows as arrays; rows that are missing at the end are empty."""
    shape = num_rows, row_tokens
    ids, positions, segment_ids, source_ids, pictures = (np.zeros(shape, np.int32) for _ in range(5))
    loss_mask = np.zeros(shape, bool)
    tiles = np.zeros((num_rows, row_tiles, 3, tile_size, tile_size), np.float32) if row_tiles else None
    for b, row in enumerate(rows):
        begin = first_tile = 0
        for segment, packed in enumerate(row.documents, start=1):
            example = packed.example
            end, last_tile = begin + len(example.ids), first_tile + len(example.tiles)
            ids[b, begin:end], loss_mask[b, begin:end] = example.ids, example.loss_mask
            positions[b, begin:end] = np.arange(end - begin)
            segment_ids[b, begin:end], source_ids[b, begin:end] = segment, packed.source_id
            if last_tile > first_tile:
                tiles[b, first_tile:last_tile] = to_numbers(example.tiles)
                pictures[b, begin:end] = 1
            begin, first_tile = end, last_tile
    return {
        "ids": ids,
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask,
        "source_ids": source_ids,
        "pictures": pictures,
        "tiles": tiles,
    }
