"""The temperature of layers without positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from l4jax.config import preset
from l4jax.model.attention import temperature
from l4jax.model.llama4 import default_positions

TEXT = preset("scout").text_config


def test_temperature_steps_at_the_floor_and_not_before():
    positions = jnp.array([[0, 8176, 8190, 8191, 16382, 16383, 10**6, 10**7]])
    expected = [1, 1, 1, 1.0693147, 1.0693147, 1.1098612, 1.481218, 1.710743]
    np.testing.assert_allclose(temperature(TEXT, positions)[0], expected, rtol=1e-6)


def test_temperature_can_be_off():
    off = dataclasses.replace(TEXT, attn_temperature_tuning=False)
    np.testing.assert_array_equal(temperature(off, jnp.array([[10**7]])), [[1.0]])


def test_positions_count_real_tokens_of_each_document():
    packed = jnp.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 3, 3, 3, 5, 0]])
    np.testing.assert_array_equal(
        default_positions(packed.shape, packed, None), [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 0, 0]]
    )
    left = jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(
        default_positions(left.shape, left, jnp.array([10, 0])), [[10, 10, 10, 11], [0, 1, 2, 2]]
    )
