"""l4jax through the conformance set. Needs neither torch nor transformers."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.config import load_config, preset
from l4jax.model.rope import frequencies
from tests.oracle import load_l4jax

HERE = Path(__file__).parent
TOLERANCE = 2e-5
PROMPT = 11

both = pytest.mark.parametrize("name", ["scout", "maverick"])


@cache
def model(name):
    return load_l4jax(HERE / name, load_config(HERE / name))


@cache
def forward(name):
    """Logits of ids, without a cache; compiled."""
    loaded = model(name)
    return jax.jit(lambda ids, **inputs: loaded(ids, **inputs)[0])


@cache
def expected(name):
    return dict(np.load(HERE / name / "expected.npz"))


def assert_close(actual, wanted):
    np.testing.assert_allclose(np.asarray(actual), wanted, rtol=0, atol=TOLERANCE)


@both
@pytest.mark.parametrize("length", [7, 8, 9, 17, 40])
def test_prefill(name, length):
    case = f"prefill_{length}"
    logits = forward(name)(expected(name)[f"{case}.ids"])
    assert_close(logits, expected(name)[f"{case}.logits"])


@both
def test_decode(name):
    ids, loaded = expected(name)["decode.ids"], model(name)
    step = jax.jit(lambda ids, cache: loaded(ids, cache=cache))
    logits, state = step(ids[:, :PROMPT], loaded.init_cache(1, ids.shape[1]))
    parts = [logits]
    for t in range(PROMPT, ids.shape[1]):
        logits, state = step(ids[:, t : t + 1], state)
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), expected(name)["decode.logits"])


@both
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_padded_and_packed_rows_equal_the_document_alone(name, layout):
    documents = [expected(name)[f"document_{i}.ids"][0] for i in range(2)]
    longest = 32
    if layout == "packed":
        gap = longest - sum(map(len, documents))
        ids = np.concatenate([*documents, np.zeros(gap, int)])[None]
        segments = np.concatenate([np.repeat([1, 2], [len(d) for d in documents]), np.zeros(gap, int)])[None]
    else:
        pads = [(0, longest - len(d)) if layout == "right" else (longest - len(d), 0) for d in documents]
        ids = np.stack([np.pad(d, pad) for d, pad in zip(documents, pads, strict=True)])
        segments = np.stack([np.pad(np.ones_like(d), pad) for d, pad in zip(documents, pads, strict=True)])
    logits = np.asarray(forward(name)(ids, segment_ids=segments))
    for i in range(2):
        mine = logits[0][segments[0] == i + 1] if layout == "packed" else logits[i][segments[i] > 0]
        assert_close(mine, expected(name)[f"document_{i}.logits"][0])


@both
def test_each_layer_sees_what_it_may(name):
    """The gradient of a query's output is zero exactly at the keys that it may not see."""
    visible = json.loads((HERE / name / "visible.json").read_text())
    text, length = model(name).config.text_config, len(visible["layer_0"])
    from l4jax.model.attention import Tokens

    tokens = Tokens.create(text, jnp.arange(length)[None], None, None)
    x = jax.random.normal(jax.random.key(0), (1, length, text.hidden_size))
    for layer, block in enumerate(model(name).layers.tail):

        def norms(x, attention=block.self_attn):
            return jnp.square(attention(x, tokens, None, 0)[0]).sum(-1)[0]

        reach = jnp.abs(jax.jacrev(norms)(x))[:, 0].sum(-1)  # [query, key]
        for query, keys in enumerate(visible[f"layer_{layer}"]):
            assert np.flatnonzero(reach[query]).tolist() == keys, (layer, query)


def test_pictures():
    arrays = expected("pictures")
    tiles = (arrays["pixels"] / 127.5 - 1).astype(np.float32)
    assert_close(forward("pictures")(arrays["ids"], tiles=tiles[None]), arrays["logits"])


@both
def test_rotary_frequencies(name):
    text = preset(name).text_config
    wanted = json.loads((HERE / "frequencies.json").read_text())[name]
    mine = frequencies(text.head_dim, text.rope_theta, text.rope_scaling)
    np.testing.assert_allclose(mine, wanted, rtol=4 * np.finfo(np.float32).eps)
