"""Boxes into arrays of any layout: `read_into` is plain indexing, in tiles."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from l4jax.checkpoint.lazy import View, read_into


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(300, 5, 260), (7,), (300, 400), (1, 300)])
def test_boxes_are_read_into_any_layout(shape, dtype):
    values = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    orders = list(itertools.permutations(range(len(shape))))
    for of_source, of_target in itertools.product(orders, orders):
        source = values.transpose(of_source)
        target = np.empty([source.shape[axis] for axis in of_target], dtype).transpose(np.argsort(of_target))
        read_into(View(source), tuple(slice(0, size) for size in source.shape), target)
        np.testing.assert_array_equal(target, source.astype(dtype))
