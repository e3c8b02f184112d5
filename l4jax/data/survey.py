"""What is in the data: counts, lengths, what cannot be read, and examples as the model sees them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from l4jax.data.config import DataConfig
from l4jax.data.encode import Encoder, Example, Skipped
from l4jax.data.packing import Packed, Packer, Row
from l4jax.data.pipeline import Stream
from l4jax.data.schema import Document, DocumentError
from l4jax.data.streams import make_encoder, open_stream
from l4jax.processing.chat import Processor
from l4jax.processing.video import spread

FIELDS = ("source", "capability", "lang")
NAMED = 10  # documents that cannot be read, or do not fit, that are named
SHOWN_EXAMPLES, SHOWN_ROWS = 5, 6
PACKED_DOCUMENTS = 20_000  # whose packing is tried out


@dataclass
class Problems:
    """Documents that something is wrong with: how many, and the first of them as lines."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(line)


@dataclass
class SourceSurvey:
    """One source of the mixture."""

    name: str
    length: int
    """Documents in it."""
    weight: float
    tokens: list[int] = field(default_factory=list)
    """Of each document that was looked at and can be read."""
    learned: list[int] = field(default_factory=list)
    """Tokens on which the loss counts, likewise."""
    tiles: list[int] = field(default_factory=list)
    pieces: list[list[tuple[int, int]]] = field(default_factory=list)
    """Tokens and tiles of what each comes to rows as; nothing if it does not fit."""
    places: list[int] = field(default_factory=list)
    """Index of each in the source."""
    kinds: list[tuple] = field(default_factory=list)
    """Of each: its capability, whether it is a conversation, whether it has pictures."""
    malformed: Problems = field(default_factory=Problems)
    too_long: Problems = field(default_factory=Problems)

    def size(self, index: int) -> tuple[int, int]:
        return self.tiles[index], self.tokens[index]


@dataclass
class Survey:
    """All sources together."""

    sources: list[SourceSurvey]
    documents_by: dict[str, Counter]
    """For each of `FIELDS`: documents by value."""
    tokens_by: dict[str, Counter]
    examples: list[tuple[str, Example]]
    """Some documents, with the names of source and place."""
    rows: list[Row]
    """Some packed rows."""
    fill: float
    """Share of the tokens of packed rows that are documents."""

    @property
    def malformed(self) -> int:
        return sum(source.malformed.count for source in self.sources)

    @property
    def too_long(self) -> int:
        return sum(source.too_long.count for source in self.sources)

    def tokens(self) -> np.ndarray:
        return np.concatenate([source.tokens for source in self.sources]).astype(np.int64)

    def tiles(self) -> np.ndarray:
        return np.concatenate([source.tiles for source in self.sources]).astype(np.int64)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Returns the header and a row for each source, to be shown."""
        header = ("source", "weight", "documents", "read", "malformed", "tokens", "learned", "tiles", "longest")
        rows = [
            (
                source.name,
                f"{source.weight:g}",
                f"{source.length:,}",
                f"{len(source.tokens):,}",
                f"{source.malformed.count:,}",
                f"{sum(source.tokens):,}",
                f"{sum(source.learned) / max(sum(source.tokens), 1):.0%}",
                f"{sum(source.tiles):,}",
                f"{max(source.tokens, default=0):,}",
            )
            for source in self.sources
        ]
        return header, rows

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON takes them."""
        return {
            "sources": {
                source.name: {
                    "documents": source.length,
                    "read": len(source.tokens),
                    "weight": source.weight,
                    "tokens": sum(source.tokens),
                    "learned_tokens": sum(source.learned),
                    "tiles": sum(source.tiles),
                    "malformed": source.malformed.count,
                    "malformed_first": source.malformed.first,
                    "too_long": source.too_long.count,
                    "too_long_first": source.too_long.first,
                }
                for source in self.sources
            },
            **{f"documents_by_{name}": dict(counts) for name, counts in self.documents_by.items()},
            **{f"tokens_by_{name}": dict(counts) for name, counts in self.tokens_by.items()},
            "tokens_histogram": dict(histogram(self.tokens())),
            "tiles_histogram": dict(histogram(self.tiles())),
            "fill": round(self.fill, 4),
        }


def survey(
    config: DataConfig,
    processor: Processor,
    *,
    seed: int,
    directory: Path,
    limit: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Survey:
    """Returns what is in the sources of a config.

    Args:
        config: the mixture and the room in a row.
        processor: of the model that is to learn from it.
        seed: of scenes, and of the order in which packing is tried out.
        directory: where scenes and line indices are kept.
        limit: documents looked at in each source, evenly spread; None: all.
        advance: called after each document.
    """
    encoder = make_encoder(config, processor)
    tile_size = processor.vision_config.image_size if processor.vision_config else 0
    in_order = replace(config, shuffle=False, skip_malformed=True)
    streams = {
        name: open_stream(name, source, in_order, seed=seed, tile_size=tile_size, directory=directory)
        for name, source in config.sources.items()
    }
    documents_by, tokens_by = ({name: Counter() for name in FIELDS} for _ in range(2))
    found = []
    for name, stream in streams.items():
        mine = SourceSurvey(name, stream.length, stream.weight)
        for index in spread(stream.length, limit or stream.length):
            _look_at(mine, index, stream.documents[index], encoder, documents_by, tokens_by)
            advance()
        found.append(mine)
    examples = list(_examples(found, streams, encoder))
    rows, fill = _pack(found, streams, encoder, seed)
    return Survey(found, documents_by, tokens_by, examples, rows, fill)


def _look_at(
    mine: SourceSurvey,
    index: int,
    document: Document | Skipped,
    encoder: Encoder,
    documents_by: Mapping[str, Counter],
    tokens_by: Mapping[str, Counter],
) -> None:
    if isinstance(document, Skipped):
        mine.malformed.add(document.reason)
        return
    try:
        example = encoder.encode(document)
    except DocumentError as error:
        mine.malformed.add(str(error))
        return
    try:
        pieces = encoder.fit(example, document)
    except DocumentError as error:
        mine.too_long.add(str(error))
        pieces = []
    mine.pieces.append([(len(piece.ids), len(piece.tiles)) for piece in pieces])
    mine.tokens.append(len(example.ids))
    mine.learned.append(int(example.loss_mask.sum()))
    mine.tiles.append(len(example.tiles))
    mine.places.append(index)
    mine.kinds.append((document.capability, document.messages is not None, len(example.tiles) > 0))
    for name in FIELDS:
        value = getattr(document, name) or "(none)"
        documents_by[name][value] += 1
        tokens_by[name][value] += len(example.ids)


def _examples(
    found: Sequence[SourceSurvey], streams: Mapping[str, Stream], encoder: Encoder
) -> Iterator[tuple[str, Example]]:
    """Yields a few documents of all sources: of each kind if there are not too many, from small to large."""
    each = -(-SHOWN_EXAMPLES // len(found))
    for source in found:
        for index in sorted(_varied(source, each), key=source.size):
            document = streams[source.name].documents[source.places[index]]
            yield f"{source.name}: {document.where}" if len(found) > 1 else document.where, encoder.encode(document)


def _varied(source: SourceSurvey, count: int) -> list[int]:
    """Returns the numbers of at most `count` documents: by turns of each kind, and of many sizes."""
    of_kind: dict[tuple, list[int]] = {}
    for index in sorted(range(len(source.kinds)), key=source.size):
        of_kind.setdefault(source.kinds[index], []).append(index)
    kinds = sorted(of_kind.values(), key=len, reverse=True)
    turns = [kind for turn in range(count) for kind in range(len(kinds)) if turn < len(kinds[kind])][:count]
    shares = Counter(turns)
    return [
        kinds[kind][place]
        for kind, share in shares.items()
        for place in (spread(len(kinds[kind]), share) if share > 1 else [len(kinds[kind]) // 2])
    ]


def _pack(
    found: Sequence[SourceSurvey], streams: Mapping[str, Stream], encoder: Encoder, seed: int
) -> tuple[list[Row], float]:
    """Tries out packing with the sizes of the documents; returns some rows in full, and how full rows are."""
    drawn = [source for source in found if source.weight and any(source.pieces)]
    if not drawn:
        return [], 0.0
    orders = [
        grain.MapDataset.range(len(source.pieces)).seed(seed).shuffle().repeat(PACKED_DOCUMENTS).map(_Numbered(number))
        for number, source in enumerate(drawn)
    ]
    mixed = grain.MapDataset.mix(orders, [source.weight for source in drawn])
    packer, closed = Packer(encoder.row_tokens, encoder.row_tiles), []
    for draw in range(min(4 * sum(len(source.pieces) for source in drawn), PACKED_DOCUMENTS)):
        number, index = mixed[draw]
        for piece, (tokens, tiles) in enumerate(drawn[number].pieces[index]):
            size = Example(
                np.empty(tokens, bool), np.empty(0, bool), np.empty((tiles, 0), bool)
            )  # all that matters here
            row = packer.add(Packed((drawn[number].name, drawn[number].places[index], piece), number, size))
            if row is not None:
                closed.append(row)
    closed = closed or list(packer.close_all())
    used = sum(encoder.row_tokens - row.free_tokens for row in closed)
    shown = [_in_full(closed[index], streams, encoder) for index in spread(len(closed), SHOWN_ROWS)]
    return shown, used / (len(closed) * encoder.row_tokens)


@dataclass(frozen=True)
class _Numbered:
    """Puts the number of the source beside the number of the document."""

    number: int

    def __call__(self, index: int) -> tuple[int, int]:
        return self.number, index


def _in_full(row: Row, streams: Mapping[str, Stream], encoder: Encoder) -> Row:
    """Returns a row of sizes with the documents themselves."""
    full = Row(encoder.row_tokens, encoder.row_tiles)
    for packed in row.documents:
        name, index, piece = packed.place
        full.add(replace(packed, example=encoder(streams[name].documents[index])[piece]))
    return full


def histogram(values: np.ndarray) -> list[tuple[str, int]]:
    """Returns counts of 0, 1, 2 or 3, 4 to 7 and so on, from the least to the largest value: `("4+", 12)`."""
    if not len(values):
        return []
    exponents = np.where(values > 0, np.floor(np.log2(np.maximum(values, 1))) + 1, 0).astype(int)
    counts = Counter(exponents.tolist())
    return [(_bin_name(exponent), counts[exponent]) for exponent in range(exponents.min(), exponents.max() + 1)]


def _bin_name(exponent: int) -> str:
    low = 2 ** (exponent - 1) if exponent else 0
    return f"{low // 1024}k+" if low >= 1024 else f"{low}+" if low > 1 else str(low)


# --- As the model sees it -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Tokens that belong together: a stretch of text, one control token, or one tile."""

    kind: Literal["text", "control", "tile"]
    text: str
    """The words, the name of the control token, or what the tile shows: its number, and whether it is a whole view."""
    tokens: int
    learned: bool


def size_line(example: Example) -> str:
    """Returns how large an example is, in words."""
    tiles = f", {len(example.tiles)} tile{'s' * (len(example.tiles) != 1)}" if len(example.tiles) else ""
    return f"{len(example.ids):,} tokens, {int(example.loss_mask.sum()):,} of them learned{tiles}"


def spans(example: Example, processor: Processor) -> Iterator[Span]:
    """Yields an example in the order in which the model reads it."""
    special = processor.tokenizer.special
    names, patch = {index: name for name, index in special.items()}, special["<|patch|>"]
    per_tile = processor.vision_config.tokens_per_tile if processor.vision_config else 1
    begin, tile, is_whole = 0, 0, False
    ids, learned = example.ids.tolist(), example.loss_mask.tolist()
    while begin < len(ids):
        token, is_learned = ids[begin], learned[begin]
        if token == patch:
            tile, end = tile + 1, begin + per_tile
            yield Span("tile", f"{tile} whole" if is_whole else str(tile), end - begin, False)
        elif token in names:
            end = begin + 1
            yield Span("control", names[token], 1, is_learned)
            # After the last row of tiles comes the view of the whole; a picture of one tile has no other.
            is_whole = token == special["<|image|>"] and ids[begin - 1] == special["<|tile_y_separator|>"]
        else:
            end = begin
            while end < len(ids) and ids[end] not in names and learned[end] == is_learned:
                end += 1
            yield Span("text", processor.decode(ids[begin:end]), end - begin, is_learned)
        begin = end
