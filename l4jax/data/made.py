"""Documents that are made on this machine from what every installation has: real material for small experiments.

Each kind is a sequence of subjects; `document(index, rng)` makes a document of one. In training `rng` differs from pass
to pass, in evaluation it does not.
"""

import string
import textwrap
import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from l4jax.data.config import CaptionsConfig, PythonDocsConfig, RecallConfig
from l4jax.data.digits import HELD_OUT, TRAINING, draw_digit, load_digits
from l4jax.data.schema import Document

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KEYS = string.ascii_uppercase + string.ascii_lowercase[16:] + string.digits
VALUES = string.ascii_lowercase[:16]
FILLER = "."
HELD_OUT_PARAGRAPHS = 10  # one in so many


class Made(Protocol):
    """Documents by index."""

    def __len__(self) -> int: ...

    def document(self, index: int, rng: np.random.Generator) -> Document: ...


class Captions:
    """One handwritten digit on one tile, and "a handwritten seven" after it."""

    def __init__(self, config: CaptionsConfig, tile_size: int, seed: int):
        self._config, self._tile_size = config, tile_size
        self._digits = load_digits(config.part)
        # As in text from the web, what is wrong stays wrong: one caption a picture.
        rng = np.random.default_rng(seed)
        labels = self._digits.labels
        others = (labels + rng.integers(1, 10, len(labels))) % 10
        self._labels = np.where(rng.random(len(labels)) < config.wrong_fraction, others, labels)

    def __len__(self) -> int:
        return len(self._digits)

    def document(self, index: int, rng: np.random.Generator) -> Document:
        size = self._tile_size
        if self._config.blank_images:
            levels = np.zeros((size, size))
        else:
            variation = HELD_OUT if self._config.part in ("held_out", "choose") else TRAINING
            levels = draw_digit(self._digits.images[index], size, variation, rng)
        image = Image.fromarray(np.round(np.clip(levels, 0, 1) * 255).astype(np.uint8))
        caption = {"type": "text", "text": f"a handwritten {NUMBERS[self._labels[index]]}"}
        return Document(f"caption {index}", content=({"type": "image", "image": image}, caption))


class PythonDocs:
    """The topics of Python's own help (`pydoc_data.topics`, half a megabyte of English), in pieces."""

    def __init__(self, config: PythonDocsConfig):
        from pydoc_data.topics import topics

        # Topics share paragraphs, so that these are divided, each of them once.
        paragraphs = dict.fromkeys(paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
        held_out = config.part == "held_out"
        self._pieces = [
            piece
            for paragraph in paragraphs
            if (zlib.crc32(paragraph.encode()) % HELD_OUT_PARAGRAPHS == 0) == held_out
            for piece in textwrap.wrap(paragraph, config.piece_bytes, break_on_hyphens=False)
            if len(piece.encode()) <= config.piece_bytes
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def document(self, index: int, rng: np.random.Generator) -> Document:
        return Document(f"piece {index}", content=({"type": "text", "text": self._pieces[index]},))


class Recall:
    """Keys, each with its value and itself again, filler, and keys again, whose values are to be known.

    Every symbol is one byte, so that places are exact: the document is `length` tokens with its first and last one.
    That the key follows its value once more is what makes the task learnable in a minute: to predict it, layers that
    see neighbours have to note at the value which key it belongs to.
    """

    def __init__(self, config: RecallConfig):
        self._config = config

    def __len__(self) -> int:
        return self._config.documents

    def document(self, index: int, rng: np.random.Generator) -> Document:
        config, items = self._config, []
        near = config.distance == "near" or (config.distance == "both" and index % 2 == 0)
        symbols, learned = [FILLER] * config.length, set()
        (self._near if near else self._far)(symbols, learned, rng)
        begin = 1  # the first token is that of the beginning of a text
        for place in [*sorted(learned), config.length - 1]:
            items.append({"type": "text", "text": "".join(symbols[begin:place]), "train": False})
            if place in learned:
                items.append({"type": "text", "text": symbols[place]})
            begin = place + 1
        return Document(f"recall {index}", content=tuple(item for item in items if item["text"]))

    def _far(self, symbols: list[str], learned: set[int], rng: np.random.Generator) -> None:
        """All pairs first, then in each chunk after them every key once at most, in any order."""
        config = self._config
        keys = rng.permutation(list(KEYS))[: config.pairs]
        values = rng.choice(list(VALUES), config.pairs)
        end = self._define(symbols, learned, 1, keys, values)
        first = -(-end // config.chunk) * config.chunk
        chunks = range(first, config.length, config.chunk)
        for start in chunks if config.ask_everywhere else chunks[-1:]:
            order = rng.permutation(config.pairs)[: config.questions]
            self._ask(symbols, learned, rng, start, start + config.chunk, keys[order], values[order])

    def _near(self, symbols: list[str], learned: set[int], rng: np.random.Generator) -> None:
        """In every chunk, or in the last, a few pairs and the same keys again."""
        config = self._config
        num_pairs = min(config.questions, (config.chunk - 2) // 6)
        spare = rng.permutation(list(KEYS))
        chunks = range(0, config.length, config.chunk)
        for start in chunks if config.ask_everywhere else chunks[-1:]:
            spare = np.roll(spare, num_pairs)
            keys, values = spare[:num_pairs], rng.choice(list(VALUES), num_pairs)
            end = self._define(symbols, learned, max(start, 1), keys, values)
            order = rng.permutation(num_pairs)
            self._ask(symbols, learned, rng, end, start + config.chunk, keys[order], values[order])

    def _define(self, symbols: list[str], learned: set[int], begin: int, keys, values) -> int:
        """Writes pairs from a place on; returns the place after them."""
        for key, value in zip(keys, values, strict=True):
            symbols[begin : begin + 3] = key, value, key
            self._learn_echo(learned, begin + 2)
            begin += 3
        return begin

    def _ask(self, symbols: list[str], learned: set[int], rng, start: int, stop: int, keys, values) -> None:
        """Writes keys with their values to random places between two."""
        room = (min(stop, self._config.length - 1) - start) // 3
        count = min(len(keys), room)
        places = start + 3 * np.sort(rng.permutation(room)[:count])
        for place, key, value in zip(places.tolist(), keys[:count], values[:count], strict=True):
            symbols[place : place + 3] = key, value, key
            learned.add(place + 1)
            self._learn_echo(learned, place + 2)

    def _learn_echo(self, learned: set[int], place: int) -> None:
        if self._config.learn_echoes:
            learned.add(place)


@dataclass(frozen=True)
class Draw:
    """Makes the document of an index; for `random_map`."""

    made: Made

    def __call__(self, index: int, rng: np.random.Generator) -> Document:
        return self.made.document(index, rng)
