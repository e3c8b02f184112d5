"""Scenes: one to four handwritten digits on a canvas of one or several tiles, as a TFDS data set, and questions.

The data set is built and read on this machine without TensorFlow: `array_record` files, PIL pictures. A scene of one
digit fills one tile, two digits lie beside or below each other, three and four share two by two cells (three leave one
cell empty, never the top left one). The model sees each tile by itself and one squashed picture of the whole, so it has
to find out which digit lies where.
"""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from l4jax.data.digits import Digits, Variation, draw_digit, load_digits

GRIDS = {1: ((1, 1),), 2: ((1, 2), (2, 1)), 3: ((2, 2),), 4: ((2, 2),)}  # (rows, columns) by number of digits
MAX_TILES = 5  # of a scene, the view of the whole included
MAX_ANSWER = 24  # bytes of the longest answer, with its end: "9 +9=18 +9=27 +9=36"
QUESTIONS = ("what is written?", "what is top left?", "what is the sum?")


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture `[height, width]` of grey levels and its digits, in reading order."""

    image: UInt8[np.ndarray, "height width"]
    digits: str


def compose(digits: Digits, num_digits: int, tile_size: int, variation: Variation, rng: np.random.Generator) -> Scene:
    """Returns a scene of `num_digits` digits drawn at random, on cells of `tile_size` pixels."""
    grids = GRIDS[num_digits]
    rows, columns = grids[rng.integers(len(grids))]
    canvas = np.zeros((rows * tile_size, columns * tile_size), np.float32)
    cells = list(range(rows * columns))
    if len(cells) > num_digits:
        cells.remove(int(rng.integers(1, len(cells))))
    chosen = rng.integers(len(digits), size=num_digits)
    for cell, index in zip(cells, chosen, strict=True):
        top, left = (cell // columns) * tile_size, (cell % columns) * tile_size
        drawn = draw_digit(digits.images[index], tile_size, variation, rng)
        canvas[top : top + tile_size, left : left + tile_size] = drawn
    image = np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return Scene(image, "".join(str(digits.labels[index]) for index in chosen))


@dataclasses.dataclass(frozen=True)
class Split:
    """How the scenes of one split are made."""

    part: str
    """Part of the digits (see `load_digits`)."""
    count: int
    """Scenes."""
    variation: Variation
    num_digits: tuple[int, ...] = (1, 2, 3, 4)
    """Digits of the first scene, the second and so on, over and over."""


def make_scenes(split: Split, tile_size: int, seed: int) -> Iterator[Scene]:
    """Yields the scenes of a split; each depends on the seed and its own index alone."""
    digits = load_digits(split.part)
    for index in range(split.count):
        rng = np.random.default_rng((seed, index))
        num_digits = split.num_digits[index % len(split.num_digits)]
        yield compose(digits, num_digits, tile_size, split.variation, rng)


def answer(digits: str, question: str) -> str:
    """Returns the true answer to one of `QUESTIONS`; the sum comes with its steps: `7 +3=10 +1=11`."""
    if question == "what is written?":
        return digits
    if question == "what is top left?":
        return digits[0]
    if question == "what is the sum?":
        steps, total = [digits[0]], int(digits[0])
        for digit in digits[1:]:
            total += int(digit)
            steps.append(f"+{digit}={total}")
        return " ".join(steps)
    raise ValueError(f"no answer is known to {question!r}; choose one of {', '.join(QUESTIONS)}")


def conversation(image: Image.Image, digits: str, question: str) -> list[dict]:
    """Returns the messages of one picture, one question and its answer."""
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer(digits, question)}]},
    ]


class DigitScenes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Scenes as TFDS examples `image` (PNG, one channel) and `digits` (text)."""

    name = "digit_scenes"
    VERSION = tfds.core.Version("1.1.0")
    code_path = Path(__file__)  # TFDS finds it through importlib_resources, which it does not install

    def __init__(self, *, splits: dict[str, Split], tile_size: int, seed: int, **kwargs):
        self.split_specs, self.tile_size, self.seed = splits, tile_size, seed
        super().__init__(file_format="array_record", **kwargs)  # the default format needs TensorFlow

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(None, None, 1)), "digits": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {name: self._generate_examples(split) for name, split in self.split_specs.items()}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
        for key, scene in enumerate(make_scenes(split, self.tile_size, self.seed)):
            yield key, {"image": Image.fromarray(scene.image), "digits": scene.digits}


class SceneSource:
    """The scenes of one split by index: `source[i]` is `(picture, digits)`. Pickles small, for worker processes."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        # The picture stays as PNG bytes here: TFDS would open it with OpenCV, or warn that there is none.
        decoders = {"image": tfds.decode.SkipDecoding()}
        # A builder read from its directory can be pickled; ours, which takes arguments of its own, cannot.
        written = tfds.builder_from_directory(builder.data_dir)
        self._examples = written.as_data_source(split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        example = self._examples[index]
        return Image.open(io.BytesIO(example["image"])), example["digits"].decode()


def build_scenes(directory: Path, *, splits: dict[str, Split], tile_size: int, seed: int) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of scenes, built in a folder of their own below `directory` unless they are there.

    Args:
      directory: Where TFDS keeps data sets.
      splits: What to make, by name of the split.
      tile_size: Side of a tile in pixels.
      seed: Of the choice and the bending of the digits.
    """
    recipe = repr((sorted(splits.items()), tile_size, seed, DigitScenes.VERSION))
    directory = directory / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    tfds.disable_progress_bar()
    builder = DigitScenes(splits=splits, tile_size=tile_size, seed=seed, data_dir=directory)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and there is none
        builder.download_and_prepare()
    return builder
