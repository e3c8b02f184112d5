"""Rotary frequencies and turns against transformers and against known values."""

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.config import preset
from l4jax.model.rope import frequencies, rotate, text_angles, vision_angles
from tests.oracle import hf_config


def text_frequencies(name: str) -> np.ndarray:
    text = preset(name).text_config
    return frequencies(text.head_dim, text.rope_theta, text.rope_scaling)


def test_scouts_frequencies_have_the_corrected_scaling():
    inv_freq, plain = text_frequencies("scout"), text_frequencies("maverick")
    np.testing.assert_array_equal(inv_freq[:35], plain[:35])
    np.testing.assert_allclose(inv_freq[35:], plain[35:] / 16, rtol=1e-6)
    np.testing.assert_allclose(inv_freq[[34, 35, 63]], [9.3847385e-4, 4.778106e-5, 1.534463e-7], rtol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["scout", "maverick", "guard-4", "small-scout", "small-guard"])
def test_frequencies_equal_transformers(name):
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

    rotary = Llama4TextRotaryEmbedding(hf_config(preset(name)).text_config)
    np.testing.assert_allclose(text_frequencies(name), rotary.inv_freq.numpy(), rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["scout", "small-scout"])
def test_vision_angles_equal_transformers(name):
    from transformers.models.llama4.modeling_llama4 import Llama4VisionRotaryEmbedding

    config = preset(name)
    table = Llama4VisionRotaryEmbedding(hf_config(config).vision_config).freqs_ci.numpy()
    angles = vision_angles(config.vision_config)
    np.testing.assert_allclose(np.cos(angles) + 1j * np.sin(angles), table.reshape(angles.shape), atol=1e-6)


def test_vision_angles_turn_by_column_then_row_and_leave_the_class_token():
    angles = vision_angles(preset("scout").vision_config)
    assert angles.shape == (577, 44)
    assert (angles[0, 0], angles[0, 22]) == (1.0, 1.0)
    assert (angles[25, 0], angles[25, 22]) == (2.0, 2.0)  # second column of the second row
    assert (angles[1, 0], angles[1, 22]) == (2.0, 1.0)
    assert not angles[576].any()


def test_pairs_are_interleaved():
    x = jnp.zeros((1, 1, 1, 8)).at[..., 2].set(1.0)
    angles = jnp.array([[[0.1, 0.2, 0.3, 0.4]]])
    turned = np.asarray(rotate(x, jnp.cos(angles), jnp.sin(angles)))[0, 0, 0]
    np.testing.assert_allclose(turned[[2, 3]], [np.cos(0.2), np.sin(0.2)], rtol=1e-6)
    assert not turned[[0, 1, 4, 5, 6, 7]].any()


def test_angles_count_inside_the_chunk():
    text = preset("scout").text_config
    positions = jnp.array([[5, 8192 + 5, 9_999_999]])
    angles = np.asarray(text_angles(text, positions))
    np.testing.assert_array_equal(angles[0, 0], angles[0, 1])
    np.testing.assert_array_equal(angles[0, 2], np.float32(9_999_999 % 8192) * text_frequencies("scout"))


def test_without_chunks_angles_are_absolute():
    text = preset("small-guard").text_config
    angles = np.asarray(text_angles(text, jnp.array([[100]])))
    np.testing.assert_array_equal(angles[0, 0], np.float32(100) * text_frequencies("small-guard"))
