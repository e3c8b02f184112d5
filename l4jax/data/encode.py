"""A document to the examples that the model learns from: usually one, several when a long document is split.

An example is `ids` [t], `loss_mask` [t] and `tiles` [n, 3, S, S]. Tiles stay bytes, a quarter of their size as numbers,
until a batch is made of them (`packing.py`). In a conversation the loss counts on what the assistant says, the closing
token included; in a document without roles on all text; nowhere on the tokens of pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from l4jax.data.schema import Document, DocumentError
from l4jax.processing.chat import Encoded, Processor
from l4jax.processing.image import LEVELS

LongDocuments = Literal["error", "split", "drop"]


@dataclass(frozen=True)
class Example:
    """What fits into one row, alone or beside others."""

    ids: Int32[np.ndarray, "t"]
    loss_mask: Bool[np.ndarray, "t"]
    """True on the tokens to learn."""
    tiles: UInt8[np.ndarray, "n 3 X X"]
    """Grey levels of all pictures' tiles, in the order of their patch tokens."""


@dataclass(frozen=True)
class Skipped:
    """A document that is left out, and why."""

    reason: str
    """One line that names the place."""


@dataclass(frozen=True)
class Encoder:
    """Makes examples of documents; pickles with its processor, for worker processes."""

    processor: Processor
    row_tokens: int
    row_tiles: int
    long_documents: LongDocuments = "error"
    skip_malformed: bool = False

    def __call__(self, document: Document | Skipped) -> list[Example] | Skipped:
        """Returns the examples of a document.

        Raises:
            DocumentError: it cannot be encoded, has nothing to learn, or does not fit into a row; not raised for what
                the settings say to leave out.
        """
        if isinstance(document, Skipped):
            return document
        try:
            example = self.encode(document)
        except DocumentError as error:
            if self.skip_malformed:
                return Skipped(str(error))
            raise
        try:
            return self.fit(example, document)
        except DocumentError as error:
            if self.long_documents == "drop":
                return Skipped(str(error))
            raise

    def encode(self, document: Document) -> Example:
        """Returns the whole document as one example, however long it is.

        Raises:
            DocumentError: it cannot be encoded, or there is nothing to learn in it.
        """
        try:
            if document.messages is not None:
                tools = document.extra.get("tools")
                encoded = self.processor.encode(document.messages, tools=tools, add_generation_prompt=False)
            else:
                encoded = self.processor.encode_document(document.content)
        except (ValueError, OSError) as error:
            raise DocumentError(f"{document.where}: {error}") from None
        if not encoded.answer_mask.any():
            raise DocumentError(
                f'{document.where}: nothing to learn: no message is of the assistant, or all have "train": false'
            )
        return Example(encoded.ids, encoded.answer_mask, to_levels(encoded))

    def fit(self, example: Example, document: Document) -> list[Example]:
        """Returns a document as examples that fit into a row.

        Raises:
            DocumentError: it does not fit, and is not to be split.
        """
        tokens, tiles = len(example.ids), len(example.tiles)
        if tokens <= self.row_tokens and tiles <= self.row_tiles:
            return [example]
        much = f"{tokens:,} tokens" if tokens > self.row_tokens else f"{tiles} tiles"
        room = f"data.row_tokens={self.row_tokens}" if tokens > self.row_tokens else f"data.row_tiles={self.row_tiles}"
        if self.long_documents == "drop":
            mend = "raise it to keep such documents"
        elif self.long_documents == "error":
            mend = "raise it, or set data.long_documents to split or drop"
        elif document.messages is not None:
            mend = (
                "a conversation is not split: its answers would lose their questions; raise it, or drop long documents"
            )
        else:
            pieces = list(self._split(example))
            if all(len(piece.ids) <= self.row_tokens and len(piece.tiles) <= self.row_tiles for piece in pieces):
                return pieces
            mend = "a picture in it is larger than a row and is not split; raise it, or lower data.max_tiles"
        raise DocumentError(f"{document.where}: it has {much}, a row has room for {room}; {mend}")

    def _split(self, example: Example) -> Iterator[Example]:
        """Yields pieces that are as long as a row allows, cut between tokens of text and never inside a picture."""
        special = self.processor.tokenizer.special
        begins = np.flatnonzero(example.ids == special["<|image_start|>"])
        ends = np.flatnonzero(example.ids == special["<|image_end|>"]) + 1
        patches = np.cumsum(np.concatenate([[0], example.ids == special["<|patch|>"]]))
        per_tile = patches[-1] // max(len(example.tiles), 1)  # tiles before token i: patches[i] / per_tile
        start = 0
        while start < len(example.ids):
            end = min(start + self.row_tokens, len(example.ids))
            first_tile = patches[start] // max(per_tile, 1)
            if per_tile:  # as far as the tiles reach
                end = min(end, int(np.searchsorted(patches, (first_tile + self.row_tiles) * per_tile, "right")) - 1)
            picture = np.flatnonzero((begins < end) & (ends > end))
            if len(picture):  # cut before the picture; if it is alone and still too large, after it
                end = begins[picture[0]] if begins[picture[0]] > start else ends[picture[0]]
            tiles = example.tiles[first_tile : patches[end] // max(per_tile, 1)]
            yield Example(example.ids[start:end], example.loss_mask[start:end], tiles)
            start = int(end)


def to_levels(encoded: Encoded) -> UInt8[np.ndarray, "n 3 X X"]:
    """Returns tiles as grey levels; `to_numbers` gives back the same values, bit for bit."""
    return np.rint((encoded.tiles + 1) * np.float32(127.5)).astype(np.uint8)


def to_numbers(levels: UInt8[np.ndarray, "n 3 X X"]) -> Float32[np.ndarray, "n 3 X X"]:
    """Returns tiles in [-1, 1], as the model takes them."""
    return LEVELS[levels]
