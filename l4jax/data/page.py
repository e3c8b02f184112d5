"""The page of `l4jax data --html`: counts, histograms, examples with their tiles, and packed rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from l4jax import report
from l4jax.data.config import DataConfig
from l4jax.data.encode import Example
from l4jax.data.packing import Row
from l4jax.data.survey import FIELDS, Span, Survey, histogram, size_line, spans
from l4jax.processing.chat import Processor

TILE_HEIGHT, SHOWN_TILES = 84, 34  # pixels on the page; tiles of an example
SHOWN_CHARACTERS = 2000  # of the text of an example
SHOWN_VALUES = 24  # of a field
ROW_WIDTH, ROW_HEIGHT = 1000, 22  # of a packed row, in SVG units
COLOURS = {"learned text": "#5fae7b", "other text": "#c9d2df", "control": "#8b97a8", "tile": "#f0a13c"}


def write_page(path: Path, found: Survey, data: DataConfig, processor: Processor, *, title: str) -> None:
    """Writes the page; it holds its pictures and needs nothing else."""
    tokens, tiles = found.tokens(), found.tiles()
    learned = sum(sum(source.learned) for source in found.sources)
    numbers = [
        (f"{len(tokens):,}", "documents looked at"),
        (f"{tokens.sum():,}", "tokens" + (", each a byte" if data.tokenizer == "bytes" else "")),
        (f"{learned / max(tokens.sum(), 1):.0%}", "of the tokens are learned"),
        (f"{tiles.sum():,}", "tiles of pictures"),
        (f"{found.fill:.1%}", f"of packed rows of {data.row_tokens:,} tokens are filled"),
        (f"{found.malformed:,}", "documents cannot be read"),
    ]
    sections = [counts_section(found, tokens, tiles), rows_section(found, data, processor)]
    sections.append(examples_section(found, processor))
    if found.malformed or found.too_long:
        sections.append(problems_section(found))
    report.write_report(path, title=f"Data: {title}", subtitle=_subtitle(found), numbers=numbers, sections=sections)


def _subtitle(found: Survey) -> str:
    sources = ", ".join(f"{source.name} ({source.length:,} documents)" for source in found.sources)
    return f"What l4jax reads from {sources}, as the model sees it."


def counts_section(found: Survey, tokens: np.ndarray, tiles: np.ndarray) -> str:
    figures = [report.bars(histogram(tokens), "documents by tokens")]
    if tiles.any():
        figures.append(report.bars(histogram(tiles), "documents by tiles"))
    fields = []
    for name in FIELDS:
        values = found.documents_by[name]
        if set(values) - {"(none)"}:
            shown = [
                (value, f"{count:,}", f"{found.tokens_by[name][value]:,}")
                for value, count in values.most_common(SHOWN_VALUES)
            ]
            fields.append(report.table((name, "documents", "tokens"), shown))
    tables = report.table(*found.table()), f'<div class="tables">{"".join(fields)}</div>'
    text = "A bar counts the documents from its number up to that of the next."
    return report.section("How much there is", text, *tables, report.charts(*figures))


# --- Packed rows ----------------------------------------------------------------------------------------------------


def rows_section(found: Survey, data: DataConfig, processor: Processor) -> str:
    key = "".join(f'<span class="key" style="background:{c}"></span>{name}' for name, c in COLOURS.items())
    room = f"{data.row_tokens:,} tokens" + (f" and {data.row_tiles} tiles" if data.row_tiles else "")
    return report.section(
        "How it is packed",
        f"Some of the rows. Each has room for {room}; a gap is the edge of a document, white is unused.",
        f'<p class="soft" style="margin-left:-14px">{key}</p>',
        _row_strips(found.rows, data.row_tokens, processor),
    )


def _row_strips(rows: Sequence[Row], row_tokens: int, processor: Processor) -> str:
    parts = []
    for number, row in enumerate(rows):
        y, at = number * (ROW_HEIGHT + 8) + 4, 0
        parts.append(f'<rect x="0" y="{y}" width="{ROW_WIDTH}" height="{ROW_HEIGHT}" fill="#fff" stroke="#e3e7ee"/>')
        for packed in row.documents:
            begin = at
            for kind, size in _runs(packed.example, processor):
                parts.append(_block(at, size, row_tokens, y, COLOURS[kind], f"{packed.place[0]}: {size:,} of {kind}"))
                at += size
            if begin:
                parts.append(_block(begin, 0, row_tokens, y, "#fff", ""))
    height = len(rows) * (ROW_HEIGHT + 8)
    return report.figure(ROW_WIDTH, height, parts, f"{len(rows)} rows, each {row_tokens:,} tokens wide")


def _runs(example: Example, processor: Processor) -> Iterator[tuple[str, int]]:
    """Yields stretches of one kind, in tokens; what comes between the tiles of a picture counts as tile."""

    def kind(span: Span) -> str:
        if span.kind == "text":
            return "learned text" if span.learned else "other text"
        return "tile" if "tile" in span.text or "image" in span.text else span.kind

    for name, run in groupby(spans(example, processor), key=kind):
        yield name, sum(span.tokens for span in run)


def _block(begin: int, size: int, row_tokens: int, y: int, colour: str, title: str) -> str:
    x, width = ROW_WIDTH * begin / row_tokens, max(ROW_WIDTH * size / row_tokens, 2)
    inside = f"<title>{report.escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.2f}" y="{y + 1}" width="{width:.2f}" height="{ROW_HEIGHT - 2}" fill="{colour}">{inside}</rect>'
    )


# --- Examples -------------------------------------------------------------------------------------------------------


def examples_section(found: Survey, processor: Processor) -> str:
    shown = [example_card(title, example, processor) for title, example in found.examples]
    return report.section(
        "As the model sees it",
        "Some documents, token by token: control tokens in grey, the places of tiles in orange, a green ground under "
        "what is learned. Tiles are numbered in the order in which they are read.",
        *shown,
    )


def example_card(title: str, example: Example, processor: Processor) -> str:
    """Returns one document: its title, its tokens as marked text, and its tiles."""
    pieces, room, names = [], SHOWN_CHARACTERS, []
    for span in spans(example, processor):
        if span.kind == "tile":
            names.append(span.text)
        if room > 0:
            kind = f"{span.kind} learned" if span.learned else span.kind
            text = f"tile {span.text}" if span.kind == "tile" else span.text[:room]
            pieces.append(f'<span class="{kind}">{report.escape(text)}</span>')
        room -= len(span.text)
    if room < 0:
        pieces.append(f'<span class="control"> ... {len(example.ids):,} tokens in all</span>')
    tiles = [
        report.framed(Image.fromarray(tile.transpose(1, 2, 0)), TILE_HEIGHT, name)
        for tile, name in zip(example.tiles[:SHOWN_TILES], names, strict=False)
    ]
    more = f'<p class="soft">and {len(names) - SHOWN_TILES} more tiles</p>' if len(names) > SHOWN_TILES else ""
    return (
        f"<h3>{report.escape(title)}</h3><p class='soft'>{size_line(example)}</p>"
        + (f'<div class="tiles">{"".join(tiles)}</div>{more}' if tiles else "")
        + f'<div class="document">{"".join(pieces)}</div>'
    )


def problems_section(found: Survey) -> str:
    lines = Counter()
    parts = []
    for title, problems in (
        ("cannot be read", [source.malformed for source in found.sources]),
        ("do not fit into a row", [source.too_long for source in found.sources]),
    ):
        count = sum(problem.count for problem in problems)
        if count:
            lines[title] = count
            named = "\n".join(line for problem in problems for line in problem.first)
            parts.append(report.details(f"{count:,} {title}: the first of them", named))
    return report.section("What is wrong", "; ".join(f"{count:,} {title}" for title, count in lines.items()), *parts)
