"""Loss and gradients against transformers and torch: each document alone there, all packed into one row here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from l4jax.model.params import flat_params
from l4jax.train.config import ParallelConfig
from l4jax.train.objective import NextToken
from l4jax.train.step import count_targets, gradients
from tests.oracle import hf_model, load_l4jax, save_hf, small_config

PATCH, TOKENS_PER_TILE = 271, 4
LENGTHS, TILES = (33, 21, 26), (2, 0, 1)  # chunks of 8, temperature floor of 4


def documents(config):
    """Returns ids and tiles of each document, and from which token on it is learned."""
    rng, side = np.random.default_rng(0), config.vision_config.image_size
    for length, num_tiles in zip(LENGTHS, TILES, strict=True):
        ids = rng.integers(0, 256, length)
        patches = num_tiles * TOKENS_PER_TILE
        ids[1 : 1 + patches] = PATCH
        yield ids, rng.uniform(-1, 1, (num_tiles, 3, side, side)).astype(np.float32), 1 + patches


def transformers_gradients(model, found):
    """Returns the mean loss over all tokens of all documents, and leaves its gradients in place of the weights."""
    import torch

    total, losses = sum(len(ids) - start for ids, _, start in found), 0.0
    for ids, tiles, start in found:
        inputs = {"input_ids": torch.tensor(ids)[None]}
        if len(tiles):
            inputs["pixel_values"] = torch.tensor(tiles)
        logits = model(**inputs, use_cache=False).logits[0]
        targets = torch.tensor(ids[start:])
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="sum") / total
        loss.backward()
        losses += loss.item()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    return losses


def packed(found):
    """Returns one row with all documents, tiles beside it, and some padding."""
    length = sum(LENGTHS) + 4
    names = ("ids", "positions", "segment_ids", "source_ids", "pictures")
    batch = {name: np.zeros((1, length), np.int32) for name in names} | {"loss_mask": np.zeros((1, length), bool)}
    begin = 0
    for number, (ids, _, start) in enumerate(found, start=1):
        end = begin + len(ids)
        batch["ids"][0, begin:end], batch["positions"][0, begin:end] = ids, np.arange(len(ids))
        batch["segment_ids"][0, begin:end], batch["source_ids"][0, begin:end] = number, 1
        batch["loss_mask"][0, begin + start : end] = True
        begin = end
    batch["tiles"] = np.concatenate([tiles for _, tiles, _ in found])[None]
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "microbatches"), [("small-scout", 1), ("small-maverick", 2)])
def test_loss_and_gradients_of_packed_documents_equal_those_of_transformers(name, microbatches, tmp_path):
    config = small_config(name, num_hidden_layers=4, **_four_layers(name))
    reference, found = hf_model(config), list(documents(config))
    model = load_l4jax(save_hf(reference, tmp_path / "weights"), config, scan_layers=True)
    expected_loss = transformers_gradients(reference, found)
    expected = flat_params(load_l4jax(save_hf(reference, tmp_path / "gradients"), config, scan_layers=True))

    graphdef, params = nnx.split(model)
    batch = packed(found)
    if microbatches == 2:  # twice the same row has the same mean
        batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    rows, total = count_targets(batch)
    objective = NextToken(graphdef, ParallelConfig(microbatches=microbatches, remat="full"))

    @jax.jit
    def run(params):
        return gradients(lambda p, r: objective(p, r, None, None, 0), params, rows, total, microbatches)

    grads, loss, numbers = run(nnx.to_pure_dict(params))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert numbers["buckets"]["tokens"].sum() == total
    ours = {jax.tree_util.keystr(path, simple=True, separator="."): g for path, g in jax.tree.leaves_with_path(grads)}
    assert ours.keys() == expected.keys()
    error = np.sqrt(sum(np.square(ours[path] - expected[path]).sum() for path in ours))
    assert error <= 1e-5 * np.sqrt(sum(np.square(g).sum() for g in expected.values()))
    for path, gradient in ours.items():  # and none is hidden by larger ones
        wrong = np.linalg.norm(gradient - expected[path]) / max(np.linalg.norm(expected[path]), 1e-6)
        assert wrong <= 1e-4, path


def _four_layers(name: str) -> dict:
    moe_layers = (0, 1, 2, 3) if name == "small-scout" else (1, 3)
    return {"moe_layers": moe_layers, "no_rope_layers": (1, 1, 1, 0)}
