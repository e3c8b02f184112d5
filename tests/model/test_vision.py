"""The vision tower against transformers, stage by stage, and its layouts against index-valued arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.model.vision import patchify, pixel_shuffle
from tests.oracle import hf_model, load_l4jax, save_hf, small_config


@pytest.fixture(scope="module")
def towers(tmp_path_factory, torchvision):
    config = small_config("small-scout")
    reference = hf_model(config)
    return reference, load_l4jax(save_hf(reference, tmp_path_factory.mktemp("hf")), config)


@pytest.mark.oracle
def test_stages_equal_transformers(towers):
    import torch

    reference, model = towers
    seen = {}
    tower = reference.vision_model
    stages = {
        "patch_embedding": tower.patch_embedding,
        "layernorm_pre": tower.layernorm_pre,
        "block 0": tower.model.layers[0],
        "block 1": tower.model.layers[1],
        "layernorm_post": tower.layernorm_post,
        "adapter": tower.vision_adapter,
        "projector": reference.multi_modal_projector,
    }
    for name, module in stages.items():
        module.register_forward_hook(
            lambda _module, _inputs, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    tiles = np.random.default_rng(0).uniform(-1, 1, (3, 3, 56, 56)).astype(np.float32)
    with torch.inference_mode():
        hidden = tower(torch.tensor(tiles)).last_hidden_state
        reference.multi_modal_projector(hidden)

    vision, ours = model.vision_model, {}
    x = ours["patch_embedding"] = vision.patch_embedding(patchify(jnp.asarray(tiles), 14))
    last = jnp.broadcast_to(vision.class_embedding[...], (3, 1, x.shape[2]))
    x = jnp.concatenate([x, last], axis=1) + vision.positional_embedding_vlm[...]
    x = ours["layernorm_pre"] = vision.layernorm_pre(x)
    from l4jax.model.rope import vision_angles

    angles = vision_angles(vision.config)[None]
    for i, block in enumerate(vision.layers.tail):
        x = ours[f"block {i}"] = block(x, jnp.cos(angles), jnp.sin(angles))
    x = ours["layernorm_post"] = vision.layernorm_post(x)
    ours["adapter"] = vision.vision_adapter(x[:, :-1])
    ours["projector"] = model.encode_tiles(jnp.asarray(tiles)[None])[0]
    for name, value in ours.items():
        expected = seen[name].numpy().reshape(value.shape)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5, err_msg=name)


def test_patches_are_row_major_with_the_channel_slowest():
    tiles = jnp.arange(3.0 * 4 * 4).reshape(1, 3, 4, 4)
    patches = patchify(tiles, 2)
    np.testing.assert_array_equal(patches[0, 0], [0, 1, 4, 5, 16, 17, 20, 21, 32, 33, 36, 37])
    np.testing.assert_array_equal(patches[0, 1, :4], [2, 3, 6, 7])


def test_pixel_shuffle_orders_channels_by_row_column_feature():
    side, width = 4, 3
    x = jnp.arange(1.0 * side * side * width).reshape(1, side * side, width)
    merged = np.asarray(pixel_shuffle(x, 2))[0]
    for row, column, dr, dc in np.ndindex(2, 2, 2, 2):
        patch = (2 * row + dr) * side + 2 * column + dc
        start = (dr * 2 + dc) * width
        np.testing.assert_array_equal(merged[row * 2 + column, start : start + width], x[0, patch])
