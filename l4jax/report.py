"""One self-contained HTML page about a run: numbers, pictures with answers, curves, expert load. Charts are inline SVG.

Nothing is fetched when the page opens, so it can be mailed or kept beside the checkpoint.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 460, 190  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 28  # margins inside of it
INK, ACCENT, GRID, EDGE = "#1d2430", "#2b6cb0", "#e9ecf1", "#f0a13c"


@dataclass(frozen=True)
class Answer:
    """A question about a picture, what the model said and what is true."""

    question: str
    said: str
    truth: str

    @property
    def is_right(self) -> bool:
        return self.said == self.truth


def write_report(
    path: Path, *, title: str, subtitle: str, numbers: Sequence[tuple[str, str]], sections: Sequence[str]
) -> None:
    """Writes the page: a headline, numbers `(value, meaning)` and sections of HTML made by the functions below."""
    template = Template((Path(__file__).parent / "report.html").read_text())
    boxes = [f'<div class="number"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in numbers]
    page = template.substitute(
        title=escape(title), subtitle=escape(subtitle), numbers="".join(boxes), sections="\n".join(sections)
    )
    path.write_text(page, encoding="utf-8")


def escape(text: str) -> str:
    return html.escape(str(text))


def section(title: str, text: str, *content: str) -> str:
    """Returns a section of the page; `text` is plain, `content` is HTML."""
    return f"<section><h2>{escape(title)}</h2><p class='soft'>{escape(text)}</p>{''.join(content)}</section>"


def charts(*figures: str) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=value' if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def picture(image: Image.Image, height: int) -> str:
    """Returns an <img> that holds the picture itself, `height` pixels high on the page, its pixels sharp."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    width = round(height * image.width / image.height)
    return f'<img alt="" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def scene_card(image: Image.Image, answers: Sequence[Answer]) -> str:
    """Returns a picture with the model's answers, the truth beside those that are wrong."""
    height = 52 if image.height < 40 else 104
    lines = []
    for answer in answers:
        truth = "" if answer.is_right else f' <span class="truth">is {escape(answer.truth)}</span>'
        kind = "right" if answer.is_right else "wrong"
        said = escape(answer.said) or "(nothing)"
        lines.append(f'<dt>{escape(answer.question)}</dt><dd><span class="{kind}">{said}</span>{truth}</dd>')
    missed = "" if all(answer.is_right for answer in answers) else " missed"
    return (
        f'<div class="scene{missed}"><div class="picture">{picture(image, height)}</div><dl>{"".join(lines)}</dl></div>'
    )


def scene_cards(cards: Sequence[str]) -> str:
    return f'<div class="scenes">{"".join(cards)}</div>'


# --- Curves ---------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [tick * step for tick in range(first, math.floor(high / step + 1e-9) + 1)]


def curve(xs: Sequence[float], ys: Sequence[float], caption: str, *, low: float | None = None) -> str:
    """Returns a line chart as a figure; `low` is the bottom of the axis, by default the least value."""
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low = min(ys) if low is None else low
    y_high = max(max(ys), y_low + 1e-9)
    y_high += 0.04 * (y_high - y_low)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for tick in nice_ticks(y_low, y_high, 4):
        y = place(x_low, tick).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in nice_ticks(x_low, x_high, 5):
        x = place(tick, y_low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{short(tick)}</text>')
    points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{ACCENT}" stroke-width="1.6"/>')
    return figure(WIDTH, HEIGHT, parts, caption)


def bars(counts: Sequence[tuple[str, int]], caption: str) -> str:
    """Returns a histogram as a figure: a bar for each `(name, count)`, the count above it."""
    most = max((count for _, count in counts), default=0) or 1
    wide = (WIDTH - 2 * RIGHT) / max(len(counts), 1)
    parts = []
    for i, (name, count) in enumerate(counts):
        tall = (HEIGHT - TOP - 16 - BOTTOM) * count / most
        x, y, middle = RIGHT + i * wide, HEIGHT - BOTTOM - tall, RIGHT + (i + 0.5) * wide
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{max(wide - 2, 1):.1f}" height="{tall:.1f}" fill="{ACCENT}">'
            f"<title>{escape(name)}: {count:,}</title></rect>"
            f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(name)}</text>'
        )
        if count:
            parts.append(f'<text x="{middle:.1f}" y="{y - 5:.1f}" text-anchor="middle">{short(count)}</text>')
    parts.append(
        f'<line x1="{RIGHT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="{GRID}"/>'
    )
    return figure(WIDTH, HEIGHT, parts, caption)


def short(number: float) -> str:
    """Returns a number as an axis writes it: 12k, 0.002, 40."""
    if abs(number) >= 1000:
        return f"{number / 1000:g}k"
    return f"{number:.6g}"


def figure(width: float, height: float, parts: Sequence[str], caption: str) -> str:
    """Returns SVG elements as a figure that is as wide as its column."""
    drawing = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(caption)}">{"".join(parts)}</svg>'
    )
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


# --- Expert load ----------------------------------------------------------------------------------------------------


def load_map(steps: Sequence[int], loads: Sequence[Sequence[Sequence[int]]], layers: Sequence[int]) -> list[str]:
    """Returns a heat map for each mixture layer: experts from top to bottom, time from left to right.

    Args:
        steps: of each record.
        loads: tokens by record, mixture layer and expert.
        layers: numbers of the mixture layers.
    """
    tokens = np.asarray(loads, float)
    share = tokens / np.maximum(tokens.sum(axis=2, keepdims=True), 1) * tokens.shape[2]
    return [
        _load_figure(steps, share[:, i], f"layer {layer}: an expert's share of the tokens, 1 = even")
        for i, layer in enumerate(layers)
    ]


def _load_figure(steps: Sequence[int], share: np.ndarray, caption: str) -> str:
    num_records, num_experts = share.shape
    # A record is a few steps; more columns than this cannot be told apart.
    groups = np.array_split(np.arange(num_records), min(num_records, 90))
    columns = np.stack([share[group].mean(axis=0) for group in groups])
    wide, tall = (WIDTH - LEFT - RIGHT) / len(columns), (HEIGHT - TOP - BOTTOM) / num_experts
    parts = []
    for i, column in enumerate(columns):
        for expert, value in enumerate(column):
            x, y = LEFT + i * wide, TOP + expert * tall
            # Cells overlap by a hair: the page's scaling would show the paper between them.
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide + 0.4:.2f}" height="{tall + 0.4:.2f}" '
                f'fill="{load_colour(value)}"><title>expert {expert}: {value:.2f}</title></rect>'
            )
    for expert in range(0, num_experts, max(1, num_experts // 8)):
        y = TOP + (expert + 0.5) * tall + 4
        parts.append(f'<text x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{expert}</text>')
    for tick in nice_ticks(steps[0], steps[-1], 5):
        x = LEFT + (tick - steps[0]) / max(steps[-1] - steps[0], 1) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(tick)}</text>')
    return figure(WIDTH, HEIGHT, parts, caption)


def load_colour(share: float) -> str:
    """Returns white at the even share, blue towards 0, orange towards 3 times the even share and beyond."""
    if share < 1:
        mix, end = 1 - share, (43, 108, 176)
    else:
        mix, end = min((share - 1) / 2, 1), (217, 119, 33)
    return "#" + "".join(f"{round(255 + (channel - 255) * mix):02x}" for channel in end)


# --- What the model sees --------------------------------------------------------------------------------------------


def tile_overlay(
    image: Image.Image, boxes: Sequence[tuple[float, float, float, float]], height: int, caption: str
) -> str:
    """Returns a picture with its tiles drawn on it and numbered in the order in which the model reads them."""
    scale = height / image.height
    parts = []
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        x, y, wide, tall = left * scale, top * scale, (right - left) * scale, (bottom - top) * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="none" stroke="{EDGE}" '
            f'stroke-width="2"/><text x="{x + 6:.1f}" y="{y + 16:.1f}" style="fill:{EDGE}">{number}</text>'
        )
    width = image.width * scale
    drawing = f'<svg viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>'
    box = f'<div class="overlay" style="width:{width:g}px">{picture(image, height)}{drawing}</div>'
    return f"<figure>{box}<figcaption>{escape(caption)}</figcaption></figure>"


def framed(image: Image.Image, height: int, caption: str) -> str:
    return f"<figure>{picture(image, height)}<figcaption>{escape(caption)}</figcaption></figure>"


def token_strip(kinds: Sequence[str], chunk_size: int, colours: dict[str, str]) -> str:
    """Returns a conversation as one cell a token, coloured by kind, with the chunk edges as lines.

    Args:
        kinds: of each token.
        chunk_size: tokens.
        colours: kind -> colour, in the order of the key below the strip.
    """
    cell, per_line = 11, 96
    parts = []
    for i, kind in enumerate(kinds):
        x, y = (i % per_line) * cell, (i // per_line) * 26
        parts.append(
            f'<rect x="{x + 1}" y="{y + 4}" width="{cell - 2}" height="14" rx="2" fill="{colours[kind]}">'
            f"<title>position {i}: {escape(kind)}</title></rect>"
        )
        if i and i % chunk_size == 0:
            parts.append(f'<line x1="{x}" x2="{x}" y1="{y}" y2="{y + 22}" stroke="{INK}" stroke-width="1.6"/>')
    lines = math.ceil(len(kinds) / per_line)
    x = 0
    for kind, colour in colours.items():
        parts.append(f'<rect x="{x}" y="{lines * 26 + 10}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17}" y="{lines * 26 + 20}">{escape(kind)}</text>')
        x += 40 + 6.4 * len(kind)
    caption = f"{len(kinds)} tokens; a line marks the edge of a chunk of {chunk_size}"
    return figure(per_line * cell, lines * 26 + 28, parts, caption)
