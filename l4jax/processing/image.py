"""A picture to tiles: the grid that fits it best, resize, pad, split, and one small view of the whole.

The rules are those of `image_processing_llama4.py` of transformers, whose grids and sizes are reproduced exactly;
pixels are resized by Pillow, as in Meta's `preprocess.py`. Pixel values stay in float32, where transformers rounds
them to bfloat16. No file is decoded before its size is known to be harmless.
"""

import contextlib
import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 36_000_000  # a PNG of 20 KiB can hold 169 million, half a gigabyte once decoded
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow would open 43, among them EPS and WMF

# What Pillow's readers raise on damaged files: the first two of every kind, the others seldom.
DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# EXIF orientation -> what turns the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The normalised value of each grey level: mean 0.5, deviation 0.5.
LEVELS = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)

ImageSource = str | PathLike | bytes | Image.Image


@dataclass(frozen=True)
class TiledImage:
    """A picture cut into tiles."""

    tiles: Float32[np.ndarray, "n 3 X X"]
    """Values in [-1, 1]: the tiles of the grid row by row, then the whole picture as one tile if there are several."""
    grid: tuple[int, int]
    """Rows and columns."""


def load_image(source: ImageSource, *, name: str | None = None) -> Image.Image:
    """Returns a picture as RGB, turned upright by its EXIF tag, transparency laid on white.

    Args:
        source: path or content of a JPEG, PNG or WebP file, or a Pillow image.
        name: what to call the picture in errors; the path by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not one of the formats, damaged, truncated, or larger than 36 million pixels.
    """
    if isinstance(source, Image.Image):
        return _decode(source, name or "the picture")
    if isinstance(source, bytes):
        return _open_and_decode(io.BytesIO(source), name or "the picture")
    if not isinstance(source, str | PathLike):
        raise ValueError(f"a picture must be a path, bytes or a Pillow image, not {type(source).__name__}")
    name = name or str(source)
    try:
        with open(source, "rb") as file:
            return _open_and_decode(file, name)
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture {name}; check the path") from None
    except OSError as error:
        raise ValueError(f"cannot read picture {name}: {error.strerror}") from None


def _open_and_decode(file: BinaryIO, name: str) -> Image.Image:
    return _decode(open_checked(file, name, FORMATS), name)


def open_checked(file: BinaryIO, name: str, formats: tuple[str, ...]) -> Image.Image:
    """Returns the undecoded picture in `file`.

    Raises:
        ValueError: it is none of `formats`, or too large to decode safely.
    """
    try:
        with _strict_pillow():
            image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture this program reads ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise ValueError(_too_large(name)) from None
    except DECODE_ERRORS as error:
        raise ValueError(damaged(name, error)) from None
    _check_size(image, name)
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        with _strict_pillow():
            image.load()
            return to_rgb(_upright(image))
    except DECODE_ERRORS as error:
        raise ValueError(damaged(name, error)) from None


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Refuses files that are cut short, also if another library told Pillow to fill them up; keeps warnings quiet.

    The warnings are of large pictures, which `_check_size` refuses, and of damaged EXIF tags, which do no harm.
    """
    fills_up, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = fills_up


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(name, f" ({width} x {height})"))
    if not width or not height:
        raise ValueError(f"{name} is empty ({width} x {height} pixels)")


def _too_large(name: str, size: str = "") -> str:
    return f"{name} is too large{size}: more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller"


def damaged(name: str, error: BaseException) -> str:
    """Returns the line that says so."""
    return f"{name} is damaged or cut short: {' '.join(str(error).split()) or type(error).__name__}; fetch it again"


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's own exif_transpose also writes the tags anew, and fails where one of them is odd.
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except DECODE_ERRORS:
        return image  # tags that cannot be read say nothing about the picture
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` in mode RGB; what is transparent becomes white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion cuts all above 255 off, and the picture is white.
        levels = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


@functools.cache
def _grids(max_tiles: int) -> np.ndarray:
    sides = range(1, max_tiles + 1)
    return np.array([(rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles])


def choose_grid(height: int, width: int, *, image_size: int = 336, max_tiles: int = 16) -> tuple[int, int]:
    """Returns the (rows, columns) of tiles for a picture of `height` x `width` pixels.

    The canvas that enlarges the picture least, else the one that shrinks it least; of equal ones the smallest.
    """
    grids = _grids(max_tiles)
    # Ratios in float32 as in the reference: which of them are equal depends on the rounding.
    scales = (grids * image_size).astype(np.float32) / np.array([height, width], np.float32)
    scale = scales.min(axis=1)
    best = scale[scale >= 1].min() if (scale >= 1).any() else scale.max()
    rows, columns = min(grids[scale == best].tolist(), key=math.prod)
    return rows, columns


def fit_size(height: int, width: int, grid: tuple[int, int], *, image_size: int = 336) -> tuple[int, int]:
    """Returns the (height, width) in pixels to which a picture is resized on the canvas of `grid`.

    The aspect ratio is kept. Only a picture smaller than a tile is enlarged, up to the tile.
    """
    limits = [min(max(side, image_size), tiles * image_size) for side, tiles in zip((height, width), grid, strict=True)]
    # Where the canvas is the limit transformers divides tensors, in float32, else Python numbers, in float64. For some
    # squares above 2,084 pixels it shows: one column of pixels more or less. Meta's code has float64 throughout.
    scales = [
        np.float32(limit) / np.float32(side) if limit < max(side, image_size) else limit / side
        for limit, side in zip(limits, (height, width), strict=True)
    ]
    if np.float32(scales[1]) < np.float32(scales[0]):
        return max(1, min(math.floor(height * scales[1]), limits[0])), limits[1]
    return limits[0], max(1, min(math.floor(width * scales[0]), limits[1]))


def tile_image(image: Image.Image, *, image_size: int = 336, max_tiles: int = 16) -> TiledImage:
    """Returns an RGB picture cut into square tiles: at most `max_tiles`, and one more that shows the whole."""
    grid = rows, columns = choose_grid(image.height, image.width, image_size=image_size, max_tiles=max_tiles)
    height, width = fit_size(image.height, image.width, grid, image_size=image_size)
    canvas = np.zeros((rows * image_size, columns * image_size, 3), np.uint8)
    canvas[:height, :width] = _resize(image, height, width)
    pixels = canvas.reshape(rows, image_size, columns, image_size, 3)
    pixels = pixels.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, image_size, image_size)
    if rows * columns > 1:
        # The aspect ratio is not kept here: the whole picture is squeezed into the square.
        whole = _resize(image, image_size, image_size).transpose(2, 0, 1)
        pixels = np.concatenate([pixels, whole[None]])
    return TiledImage(LEVELS[pixels], grid)


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    # Pillow widens the bilinear filter when it shrinks, which is what other libraries call antialiasing.
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def tile_boxes(
    height: int, width: int, *, image_size: int = 336, max_tiles: int = 16
) -> list[tuple[float, float, float, float]]:
    """Returns (left, top, right, bottom) of each tile of the grid, in pixels of the original picture, row by row.

    Boxes reach beyond the picture where the canvas is padded.
    """
    grid = choose_grid(height, width, image_size=image_size, max_tiles=max_tiles)
    new_height, new_width = fit_size(height, width, grid, image_size=image_size)
    tall, wide = image_size * height / new_height, image_size * width / new_width
    return [
        (column * wide, row * tall, (column + 1) * wide, (row + 1) * tall)
        for row in range(grid[0])
        for column in range(grid[1])
    ]
