"""Pictures to tiles against transformers and Meta, and files that are damaged or dangerous."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from l4jax.processing.image import choose_grid, fit_size, load_image, tile_boxes, tile_image

GOLDEN = json.loads((Path(__file__).parent / "golden" / "image.json").read_text())

# Height x width; all kinds of grids, edges of a tile, one pixel, extreme ratios.
SIZES = [
    *[(1, 1), (1, 2), (2, 1), (3, 700), (700, 3), (16, 16), (28, 28), (100, 100), (335, 335), (336, 336), (337, 336)],
    *[(336, 337), (337, 337), (200, 500), (336, 672), (672, 336), (536, 640), (600, 900), (640, 480), (672, 1008)],
    *[(768, 1024), (1000, 1000), (1080, 1920), (1344, 1344), (1345, 1345), (4000, 500), (500, 4000), (50, 3000)],
    *[(3000, 50), (1, 4000), (2085, 2085), (2096, 2096), (1284, 3424), (2400, 1600), (997, 1009)],
]
# transformers computes in bfloat16: u8/255 is rounded by at most 2**-9, doubled by the division by 0.5. Its resize and
# Pillow's may differ by one grey level, 1/127.5.
TOLERANCE = 1 / 127.5 + 2 * 2**-9 + 1e-6


def picture(height, width, seed=0):
    """Smooth colours with noise on them, so that a wrong filter or a shift by one pixel shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + rng.integers(-40, 41, smooth.shape)).clip(0, 255).astype(np.uint8))


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def bomb(side=13_000):
    """A small PNG that unpacks to side * side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (side // 8 + 2)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def hf_processor(hf_images):
    return hf_images.Llama4ImageProcessor()


@pytest.mark.oracle
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tiles_equal_transformers_within_one_grey_level(hf_processor, height, width):
    image = picture(height, width)
    theirs = hf_processor(image, return_tensors="pt")
    ours = tile_image(image)
    assert list(ours.grid) == theirs["aspect_ratios"][0].tolist()
    assert np.abs(ours.tiles - theirs["pixel_values"].float().numpy()).max() <= TOLERANCE


@pytest.mark.oracle
@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if size[0] not in (2085, 2096, 1284)])
def test_tiles_equal_meta_bit_for_bit(meta_chat, height, width):
    image = picture(height, width)
    tiles, grid = meta_chat.VariableSizeImageTransform(336)(image, max_num_chunks=16)
    ours = tile_image(image)
    assert ours.grid == grid
    np.testing.assert_array_equal(ours.tiles[: len(tiles)], tiles.numpy())
    if len(tiles) > 1:
        np.testing.assert_array_equal(ours.tiles[-1], meta_chat.ResizeNormalizeImageTransform(336, 336)(image).numpy())


@pytest.mark.oracle
def test_grid_and_size_equal_transformers_for_thousands_of_sizes(hf_images):
    import torch

    resolutions = torch.tensor(hf_images.find_supported_resolutions(16, hf_images.SizeDict(height=336, width=336)))
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(6000), (3000, 2))).astype(int)
    squares = np.repeat(np.arange(2000, 3000)[:, None], 2, axis=1)
    multiples = 168 * rng.integers(1, 20, (500, 2))
    for height, width in np.concatenate([sides, squares, multiples]).tolist():
        canvas = hf_images.get_best_fit((height, width), resolutions)
        limits = min(max(height, 336), canvas[0]), min(max(width, 336), canvas[1])
        size = hf_images.get_max_res_without_distortion((height, width), limits)
        grid = choose_grid(height, width)
        assert [side * 336 for side in grid] == canvas.tolist()
        assert fit_size(height, width, grid) == tuple(max(1, int(side)) for side in size)


@pytest.mark.oracle
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "transparent palette"])
def test_colour_modes_equal_transformers(hf_processor, mode):
    image = picture(400, 300)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(400, 300, seed=1).convert("L"))
    if mode == "transparent palette":
        image = image.quantize(64)
        image.info["transparency"] = 5
    else:
        image = image.convert(mode)
    theirs = hf_processor(image, return_tensors="pt")["pixel_values"].float().numpy()
    np.testing.assert_allclose(tile_image(load_image(image)).tiles, theirs, rtol=0, atol=TOLERANCE)


def test_grids_and_sizes_equal_the_stored_ones_of_transformers():
    for height, width, grid, size in GOLDEN["sizes"]:
        assert list(choose_grid(height, width)) == grid
        assert list(fit_size(height, width, tuple(grid))) == size


def test_tiles_equal_the_stored_ones_of_transformers():
    for case in GOLDEN["tiles"]:
        ours = tile_image(picture(*case["size"])).tiles
        shrunk = ours.reshape(len(ours), 3, 4, 84, 4, 84).mean(axis=(3, 5))
        assert np.abs(shrunk - np.array(case["means"])).max() <= 2 * 2**-9


def test_values_are_in_range_and_padding_is_black():
    tiled = tile_image(picture(400, 900))
    assert tiled.grid == (2, 3)
    assert tiled.tiles.shape == (7, 3, 336, 336)
    assert tiled.tiles.dtype == np.float32
    assert -1 <= tiled.tiles.min() < tiled.tiles.max() <= 1
    below = tiled.tiles[3:6, :, 400 - 336 + 1 :]
    assert (below == -1).all()


def test_a_small_picture_is_enlarged_to_one_tile():
    tiled = tile_image(Image.new("RGB", (1, 1), (255, 0, 0)))
    assert tiled.grid == (1, 1)
    assert tiled.tiles.shape == (1, 3, 336, 336)
    assert (tiled.tiles[0, 0] == 1).all()
    assert (tiled.tiles[0, 1:] == -1).all()


def test_other_tile_sizes():
    tiled = tile_image(picture(28, 56), image_size=28, max_tiles=4)
    assert tiled.grid == (1, 2)
    assert tiled.tiles.shape == (3, 3, 28, 28)
    left = np.asarray(picture(28, 56))[:, :28].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(tiled.tiles[0], left, atol=1e-6)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([28, 56, 336]), st.integers(1, 16))
def test_the_picture_fits_its_canvas(height, width, image_size, max_tiles):
    grid = choose_grid(height, width, image_size=image_size, max_tiles=max_tiles)
    size = fit_size(height, width, grid, image_size=image_size)
    assert 1 <= grid[0] * grid[1] <= max_tiles
    assert all(1 <= side <= tiles * image_size for side, tiles in zip(size, grid, strict=True))
    assert any(side == tiles * image_size for side, tiles in zip(size, grid, strict=True)) or size == (height, width)


def test_tile_boxes_cover_the_picture():
    boxes = tile_boxes(600, 900)
    assert len(boxes) == 6
    assert boxes[0] == (0, 0, 336, 336)
    assert boxes[-1][2] >= 900
    assert boxes[-1][3] >= 600
    shrunk = tile_boxes(2688, 2688)
    assert shrunk[0] == (0, 0, 672, 672)
    assert shrunk[-1] == (2016, 2016, 2688, 2688)


def test_transparent_becomes_white():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert load_image(png(image)).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (4, 4), (0, 128))
    assert load_image(png(grey)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette(range(12))
    assert load_image(png(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_shades():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.asarray(load_image(png(Image.fromarray(levels))))[..., 0].tolist() == (levels >> 8).tolist()


def test_exif_turns_the_picture_upright(tmp_path):
    image = Image.new("RGB", (30, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 10))  # white corner at the top left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = load_image(tmp_path / "turned.jpg")
    assert turned.size == (20, 30)
    assert turned.getpixel((18, 2)) > (200, 200, 200)
    assert turned.getpixel((2, 2)) < (50, 50, 50)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture(20, 30).save(file, "PNG", exif=exif)
    turned = load_image(file.getvalue())
    assert turned.tobytes() == ImageOps.exif_transpose(Image.open(file)).tobytes()


def test_damaged_exif_is_no_reason_to_refuse_a_picture():
    for exif in (b"Exif\x00\x00nonsense", b"", b"II*\x00\xff\xff\xff\xff"):
        assert load_image(png(picture(20, 30), exif=exif)).size == (30, 20)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats_are_read_from_path_bytes_and_pillow(tmp_path, kind):
    path = tmp_path / "picture.bin"
    picture(40, 60).save(path, kind)
    loaded = [load_image(path), load_image(str(path)), load_image(path.read_bytes()), load_image(Image.open(path))]
    assert all(image.mode == "RGB" and image.size == (60, 40) for image in loaded)
    assert len({image.tobytes() for image in loaded}) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture .*cat\.jpg; check the path"):
        load_image(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="cannot read picture"):
        load_image(tmp_path)


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "cat.gif"
    picture(20, 20).save(path)
    with pytest.raises(ValueError, match=r"cat\.gif is not a picture this program reads \(JPEG, PNG, WEBP\)"):
        load_image(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"cat\.gif is not a picture"):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    path = tmp_path / "cat.bin"
    picture(200, 200).save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cat\.bin is damaged or cut short: .*fetch it again") as error:
        load_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", [6_500, 13_000, 14_000])
def test_a_picture_that_unpacks_to_too_much_is_refused(side):
    content = bomb(side)
    assert len(content) < 40_000
    with pytest.raises(ValueError, match=r"cat\.png is too large.*more than 36 million pixels"):
        load_image(content, name="cat.png")


@st.composite
def damaged_pictures(draw):
    """Pictures with bytes replaced, cut out or put in."""
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(SEEDS[kind])
    for _ in range(draw(st.integers(1, 8))):
        position = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 8))
        content[position : position + length] = draw(st.binary(max_size=8))
    return bytes(content)


def _seeds():
    seeds = {}
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        image = picture(17, 23).quantize(16) if kind == "PNG" else picture(17, 23)
        image.save(file, kind, exif=exif)
        seeds[kind] = file.getvalue()
    return seeds


SEEDS = _seeds()


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.one_of(st.binary(max_size=200), damaged_pictures()))
def test_damaged_bytes_give_a_picture_or_one_clear_line(content):
    message = ""
    try:
        assert load_image(content, name="cat.png").mode == "RGB"
    except ValueError as error:
        message = str(error)
    assert message == "" or (message.startswith("cat.png is ") and "\n" not in message)
