"""The table of names: sizes, places, and both directions of every pattern."""

import math

import numpy as np
import pytest
from flax import nnx

from l4jax.checkpoint import names
from l4jax.config import PRESETS, preset
from l4jax.model.llama4 import Llama4

PUBLISHED = {"scout": 108_641_793_536, "maverick": 401_583_781_376, "guard-4": 12_001_097_216}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_add_up_to_the_published_number_of_parameters(name):
    assert sum(map(math.prod, names.parameter_shapes(preset(name)).values())) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_in_one_row_of_each_form(name):
    config = preset(name)
    for form in ("fused", "single"):
        rows = names.hf_rows(config, expert_form=form)
        held = [(part.path, part.expert) for row in rows for part in row.parts]
        assert len(held) == len(set(held))
        assert {path for path, _ in held} == set(names.layer_shapes(config))


@pytest.mark.parametrize("name", ["scout", "small-maverick", "small-guard"])
def test_places_and_layer_paths_are_inverse(name):
    config = preset(name)
    for path in names.layer_shapes(config):
        assert names.layer_path(config, *names.locate(config, path)) == path


def test_layers_past_the_last_cycle_are_in_the_tail(nine_layers):
    assert names.locate(nine_layers, "layers.7.norm.scale") == ("layers.cycle.3.norm.scale", 1)
    assert names.locate(nine_layers, "layers.8.norm.scale") == ("layers.tail.0.norm.scale", None)
    assert names.layer_path(nine_layers, "layers.tail.0.norm.scale") == "layers.8.norm.scale"


def test_patterns_return_to_the_tensor_and_copy_nothing():
    config, rng = preset("small-maverick"), np.random.default_rng(0)
    for row in names.hf_rows(config):
        for part in row.parts:
            sizes = names.part_sizes(config, part.path)
            tensor = rng.standard_normal(names.source_shape(part.pattern, sizes))
            parameter = names.to_parameter(tensor, part.pattern, sizes)
            assert parameter.shape == names.part_shape(config, part)
            assert np.shares_memory(parameter, tensor)
            np.testing.assert_array_equal(names.to_tensor(parameter, part.pattern), tensor)


def test_an_unknown_path_is_refused_by_name():
    with pytest.raises(KeyError, match=r"layers\.tail\.99"):
        names.places(preset("small-scout"), ["layers.tail.99.norm.scale"])


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [*((name, True) for name in PUBLISHED), ("small-scout", False), ("small-maverick", False), ("small-guard", False)],
)
def test_the_table_is_the_model(name, scan_layers):
    """Paths and shapes equal those of the abstract model, without allocating it."""
    config = preset(name)
    model = nnx.eval_shape(lambda: Llama4(config, rngs=nnx.Rngs(0), scan_layers=scan_layers))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    found = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in flat}
    if scan_layers:
        assert found == names.parameter_shapes(config)
    else:
        assert found == {names.unrolled_path(path): shape for path, shape in names.layer_shapes(config).items()}
