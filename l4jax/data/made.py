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
HELD_OUT_TOPICS = 10  # one topic in so many


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

        held_out = config.part == "held_out"
        chosen = [name for name in sorted(topics) if (zlib.crc32(name.encode()) % HELD_OUT_TOPICS == 0) == held_out]
        self._pieces = [
            piece
            for name in chosen
            for piece in textwrap.wrap(topics[name], config.piece_bytes, break_on_hyphens=False)
            if len(piece.encode()) <= config.piece_bytes
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def document(self, index: int, rng: np.random.Generator) -> Document:
        return Document(f"piece {index}", content=({"type": "text", "text": self._pieces[index]},))


class Recall:
    """Pairs of a key and a value, filler, and keys again, whose values are to be known.

    Every symbol is one byte, so that places are exact: the document is `length` tokens with its first and last one.
    """

    def __init__(self, config: RecallConfig):
        self._config = config

    def __len__(self) -> int:
        return self._config.documents

    def document(self, index: int, rng: np.random.Generator) -> Document:
        config, items = self._config, []
        near = config.distance == "near" or (config.distance == "both" and index % 2 == 0)
        symbols, asked = self._near(rng) if near else self._far(rng)
        begin = 1  # the first token is that of the beginning of a text
        for place in [*sorted(asked), config.length - 1]:
            items.append({"type": "text", "text": "".join(symbols[begin:place]), "train": False})
            if place in asked:
                items.append({"type": "text", "text": symbols[place]})
            begin = place + 1
        return Document(f"recall {index}", content=tuple(item for item in items if item["text"]))

    def _far(self, rng: np.random.Generator) -> tuple[list[str], set[int]]:
        """All pairs first, then in each chunk after them every key once at most, in any order."""
        config, symbols, asked = self._config, [FILLER] * self._config.length, set()
        keys = rng.permutation(list(KEYS))[: config.pairs]
        values = rng.choice(list(VALUES), config.pairs)
        for number, (key, value) in enumerate(zip(keys, values, strict=True)):
            symbols[1 + 2 * number : 3 + 2 * number] = key, value
        first = -(-(1 + 2 * config.pairs) // config.chunk) * config.chunk
        chunks = range(first, config.length, config.chunk)
        for start in chunks if config.ask_everywhere else chunks[-1:]:
            order = rng.permutation(config.pairs)[: config.questions]
            asked |= self._ask(symbols, rng, start, keys[order], values[order])
        return symbols, asked

    def _near(self, rng: np.random.Generator) -> tuple[list[str], set[int]]:
        """In one chunk, or in each, a few pairs and the same keys again."""
        config, symbols, asked = self._config, [FILLER] * self._config.length, set()
        num_pairs = min(config.questions, (config.chunk - 2) // 4)
        chunks = range(0, config.length, config.chunk)
        spare = rng.permutation(list(KEYS))
        for start in chunks if config.ask_everywhere else chunks[-1:]:
            spare = np.roll(spare, num_pairs)
            keys, values = spare[:num_pairs], rng.choice(list(VALUES), num_pairs)
            begin = max(start, 1)
            for number, (key, value) in enumerate(zip(keys, values, strict=True)):
                symbols[begin + 2 * number : begin + 2 * number + 2] = key, value
            order = rng.permutation(num_pairs)
            asked |= self._ask(symbols, rng, begin + 2 * num_pairs, keys[order], values[order], start + config.chunk)
        return symbols, asked

    def _ask(self, symbols: list[str], rng, start: int, keys, values, stop: int | None = None) -> set[int]:
        """Writes keys with their values to random places of a chunk; returns where the values are."""
        stop = min(stop or start + self._config.chunk, self._config.length - 1)
        count = min(len(keys), (stop - start) // 2)
        places = start + 2 * np.sort(rng.permutation((stop - start) // 2)[:count])
        for place, key, value in zip(places, keys, values, strict=False):
            symbols[place : place + 2] = key, value
        return {int(place) + 1 for place in places}


@dataclass(frozen=True)
class Draw:
    """Makes the document of an index; for `random_map`."""

    made: Made

    def __call__(self, index: int, rng: np.random.Generator) -> Document:
        return self.made.document(index, rng)
