"""The whole model against transformers: every layer pattern, pictures, chunk edges, the temperature floor."""

import jax
import numpy as np
import pytest

from l4jax.model.params import abstract_model
from tests.oracle import hf_logits, hf_model, load_l4jax, save_hf, small_config

LENGTH = 50  # chunks of 8, temperature floor of 4
TOLERANCE = 2e-5  # float32 round-off of eight layers at logits of size 4; transformers itself is 5e-6 from float64

PATCH = 271


def prompt(config, tiles_at=(), batch=1, seed=0):
    """Random ids, with the patches of one tile (four) from each index in `tiles_at` on, and the tiles."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, PATCH, (batch, LENGTH))
    for start in tiles_at:
        ids[:, start : start + 4] = PATCH
    side = config.vision_config.image_size
    tiles = rng.uniform(-1, 1, (batch * len(tiles_at), 3, side, side)).astype(np.float32) if tiles_at else None
    return ids, tiles


def forward(model, ids, tiles=None):
    tiles = None if tiles is None else tiles.reshape(len(ids), -1, *tiles.shape[1:])
    return np.asarray(jax.jit(lambda ids, tiles: model(ids, tiles=tiles)[0])(ids, tiles))


CASES = {
    "scout": ("small-scout", {}, ()),
    "scout, one tile": ("small-scout", {}, (6,)),
    "scout, two pictures of several tiles": ("small-scout", {}, (2, 7, 20, 25, 31)),
    "scout, top 2": ("small-scout", {"num_experts_per_tok": 2}, (6,)),
    "scout, no qk norm, no scaling": ("small-scout", {"use_qk_norm": False, "rope_scaling": None}, ()),
    "scout, no temperature": ("small-scout", {"attn_temperature_tuning": False}, ()),
    "maverick": ("small-maverick", {}, (6, 11)),
    "maverick, top 2, qk norm": ("small-maverick", {"num_experts_per_tok": 2, "use_qk_norm": True}, ()),
    "guard": ("small-guard", {}, (6, 11)),
    "six layers": (
        "small-scout",
        {"num_hidden_layers": 6, "moe_layers": tuple(range(6)), "no_rope_layers": (1, 1, 1, 0, 1, 1)},
        (),
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    name, fields, tiles_at = CASES[case]
    config = small_config(name, **fields)
    reference = hf_model(config)
    ids, tiles = prompt(config, tiles_at, batch=2)
    expected = hf_logits(reference, ids, tiles)
    model = load_l4jax(save_hf(reference, tmp_path), config, scan_layers=True)
    np.testing.assert_allclose(forward(model, ids, tiles), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["small-scout", "small-maverick"])
def test_unrolled_layers_equal_transformers(name, tmp_path):
    config = small_config(name)
    reference = hf_model(config, seed=1)
    ids, tiles = prompt(config, (3,))
    expected = hf_logits(reference, ids, tiles)
    model = load_l4jax(save_hf(reference, tmp_path), config, scan_layers=False)
    np.testing.assert_allclose(forward(model, ids, tiles), expected, rtol=0, atol=TOLERANCE)


def test_depth_that_is_no_multiple_of_the_cycle_leaves_a_tail():
    name, fields, _ = CASES["six layers"]
    layers = abstract_model(small_config(name, **fields), scan_layers=True).layers
    assert (layers.num_cycles, len(layers.cycle), len(layers.tail)) == (1, 4, 2)


@pytest.mark.oracle
def test_bfloat16_is_within_three_percent(tmp_path):
    from transformers import Llama4ForConditionalGeneration

    config = small_config("small-scout")
    save_hf(hf_model(config), tmp_path)
    # The loader keeps the tables in float32; casting the model would not.
    reference = Llama4ForConditionalGeneration.from_pretrained(
        tmp_path, dtype="bfloat16", attn_implementation="eager"
    ).eval()
    ids, _ = prompt(config)
    expected = hf_logits(reference, ids)
    actual = forward(load_l4jax(tmp_path, config, dtype="bfloat16", scan_layers=True), ids)
    # A token whose two best experts tie in bfloat16 goes to either: compare the bulk, not the worst of them.
    error = np.abs(actual - expected).mean(-1)
    assert np.median(error) <= 0.03 * np.abs(expected).mean()
