"""Real handwritten digits (scikit-learn's copy of the UCI set, 1,797 pictures of 8x8 grey levels) and their variations.

The first 1,500 pictures are for training, the last 297 are held out: nothing is trained on them or chosen by them.
Settings are chosen on a split inside the 1,500.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

NUM_TRAIN = 1500
WOBBLE_POINTS = 5  # a side; neighbouring points of a cell move independently, what lies between them follows
NUM_CHOOSING = 200  # the last of the training pictures, set aside while settings are chosen


@dataclasses.dataclass(frozen=True)
class Digits:
    """Pictures `[n, 8, 8]` in 0..1 and their labels `[n]` in 0..9."""

    images: Float[np.ndarray, "n 8 8"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Variation:
    """How far a digit may be bent; every amount is drawn uniformly from minus to plus its limit."""

    rotation: float = 0.0  # degrees
    shear: float = 0.0  # horizontal shift per unit of height
    scale: float = 0.0  # relative change of size, for height and width apart
    shift: float = 0.0  # pixels of the canvas
    wobble: float = 0.0  # pixels of the 8x8 picture by which each part of it may move on its own
    weight: float = 0.0  # thinner or thicker strokes: grey levels to the power of exp(amount)


# Chosen by a support vector machine on 14x14 pixels, over three folds of the training pictures with six variations of
# each: 0.971 with these, 0.961 with wider turns (14 degrees, shear 0.2) and neither wobble nor weight, 0.966 with small
# shifts alone.
TRAINING = Variation(rotation=10.0, shear=0.15, scale=0.1, shift=2.0, wobble=0.5, weight=0.4)
WARM_UP = Variation(rotation=4.0, shear=0.06, scale=0.05, shift=1.0)
HELD_OUT = Variation(shift=1.0)


def load_digits(part: str) -> Digits:
    """Returns the pictures of a part: `train` (1,500), `held_out` (297), `fit` (1,300) or `choose` (200).

    `fit` and `choose` divide `train`: settings are compared on `choose` after training on `fit`.
    """
    parts = {
        "train": slice(0, NUM_TRAIN),
        "held_out": slice(NUM_TRAIN, None),
        "fit": slice(0, NUM_TRAIN - NUM_CHOOSING),
        "choose": slice(NUM_TRAIN - NUM_CHOOSING, NUM_TRAIN),
    }
    if part not in parts:
        raise ValueError(f"there is no part {part!r} of the digits; choose one of {', '.join(parts)}")
    from sklearn import datasets  # a second of import time, paid only where digits are read

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    return Digits(images[parts[part]], labels[parts[part]].astype(np.int32))


def draw_digit(
    image: Float[np.ndarray, "8 8"], cell_size: int, variation: Variation, rng: np.random.Generator
) -> Float[np.ndarray, "cell_size cell_size"]:
    """Returns the digit on a black square of `cell_size` pixels, 0.75 of it high, bent and moved within `variation`."""
    angle = np.deg2rad(rng.uniform(-variation.rotation, variation.rotation))
    shear = rng.uniform(-variation.shear, variation.shear)
    scale = 1 + rng.uniform(-variation.scale, variation.scale, size=2)
    shift = rng.uniform(-variation.shift, variation.shift, size=2)

    pixels_per_cell = 0.75 * cell_size / image.shape[0] * scale
    rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_canvas = rotate @ np.array([[1.0, 0.0], [shear, 1.0]]) @ np.diag(pixels_per_cell)
    to_image = np.linalg.inv(to_canvas)  # ndimage asks where each canvas pixel comes from
    canvas_centre = (cell_size - 1) / 2 + shift
    offset = (image.shape[0] - 1) / 2 - to_image @ canvas_centre
    canvas = np.moveaxis(np.indices((cell_size, cell_size)), 0, -1)
    source = canvas @ to_image.T + offset
    if variation.wobble:
        moves = rng.uniform(-variation.wobble, variation.wobble, size=(2, WOBBLE_POINTS, WOBBLE_POINTS))
        spread = _spread(cell_size)
        source += np.einsum("ip,cpq,jq->ijc", spread, moves, spread)
    # "grid-constant" fades into the black around the picture; plain "constant" would cut its outer pixels in half.
    drawn = ndimage.map_coordinates(image, np.moveaxis(source, -1, 0), order=1, mode="grid-constant")
    return drawn ** np.exp(rng.uniform(-variation.weight, variation.weight))


@functools.cache
def _spread(cell_size: int) -> Float[np.ndarray, "cell_size p"]:
    """Weights that interpolate linearly from `WOBBLE_POINTS` evenly spaced points to the pixels of a cell."""
    at = np.linspace(0, WOBBLE_POINTS - 1, cell_size)[:, None]
    return np.maximum(0, 1 - np.abs(at - np.arange(WOBBLE_POINTS)))


def classical_accuracy() -> float:
    """Returns the share of held-out digits that a support vector machine on plain pixels reads (RBF, C=10).

    The yardstick beside the model's own number: what a classical method gets from the same 1,500 pictures, shown one by
    one, upright and in place.
    """
    from sklearn.svm import SVC

    train, held_out = load_digits("train"), load_digits("held_out")
    classifier = SVC(C=10, gamma="scale").fit(train.images.reshape(len(train), -1), train.labels)
    return float(classifier.score(held_out.images.reshape(len(held_out), -1), held_out.labels))
