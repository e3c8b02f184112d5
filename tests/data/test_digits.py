import numpy as np
import pytest

from l4jax.data.digits import TRAINING, Variation, draw_digit, load_digits


def test_parts_divide_the_digits():
    train, held_out, fit, choose = (load_digits(part) for part in ("train", "held_out", "fit", "choose"))
    assert (len(train), len(held_out)) == (1500, 297)
    np.testing.assert_array_equal(np.concatenate([fit.images, choose.images]), train.images)
    assert train.images.min() == 0
    assert train.images.max() == 1


def test_parts_share_no_picture():
    train, held_out = load_digits("train"), load_digits("held_out")
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"no part 'test'.*held_out"):
        load_digits("test")


def test_unbent_digit_is_the_picture_enlarged():
    image = load_digits("train").images[0]
    drawn = draw_digit(image, 32, Variation(), np.random.default_rng(0))
    # 24 pixels for 8: each pixel of the picture is the middle one of three.
    np.testing.assert_allclose(drawn[5:28:3, 5:28:3], image, atol=1e-6)
    assert drawn.sum() == pytest.approx(9 * image.sum(), rel=0.01)


def test_bending_depends_on_the_generator_alone():
    image = load_digits("train").images[0]
    first, again = (draw_digit(image, 28, TRAINING, np.random.default_rng(7)) for _ in range(2))
    other = draw_digit(image, 28, TRAINING, np.random.default_rng(8))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_wobble_moves_parts_and_not_the_whole():
    image = load_digits("train").images[0]
    still = draw_digit(image, 28, Variation(), np.random.default_rng(0))
    wobbled = [draw_digit(image, 28, Variation(wobble=0.5), np.random.default_rng(seed)) for seed in range(200)]
    assert all(np.abs(drawn - still).max() > 0.05 for drawn in wobbled)
    np.testing.assert_allclose(np.mean(wobbled, axis=0), still, atol=0.2)


def test_weight_thins_and_thickens_strokes():
    image = load_digits("train").images[0]
    still = draw_digit(image, 28, Variation(), np.random.default_rng(0)).sum()
    sums = [draw_digit(image, 28, Variation(weight=0.4), np.random.default_rng(seed)).sum() for seed in range(20)]
    assert min(sums) < 0.95 * still < 1.05 * still < max(sums)


def test_every_variation_keeps_grey_levels_in_range():
    for seed, image in enumerate(load_digits("train").images[:50]):
        drawn = draw_digit(image, 28, TRAINING, np.random.default_rng(seed))
        assert drawn.min() >= 0
        assert drawn.max() <= 1
