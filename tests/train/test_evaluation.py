import math

import jax
import numpy as np
import pytest
from flax import nnx

from l4jax.data.config import SourceConfig
from l4jax.model.llama4 import Llama4
from l4jax.sharding import make_mesh
from l4jax.train.config import EvaluateConfig, ParallelConfig
from l4jax.train.evaluation import Evaluation
from tests.train.models import _compile_without_optimization, make_rows, split_model, tiny  # noqa: F401, is for every test here

CONFIG = tiny()


@pytest.fixture(scope="module")
def params():
    return split_model(CONFIG)[1]


def evaluate(params, batches, **settings):
    sources = dict.fromkeys(["first", "second"], SourceConfig(path="unread"))
    wanted, mesh = EvaluateConfig(sources=sources, **settings), make_mesh()
    with jax.set_mesh(mesh):
        return Evaluation(CONFIG, wanted, [Batches(batches)], ParallelConfig(), mesh, rows=2).run(params)


class Batches(list):
    def __iter__(self):
        return Closing(super().__iter__())


class Closing:
    def __init__(self, iterator):
        self._iterator = iterator

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)

    def close(self):
        pass


def test_numbers_equal_those_of_documents_alone(params):
    """Document by document, in plain numpy, of the logits of each document alone."""
    batches = [jax.tree.map(np.asarray, make_rows(CONFIG, seed=seed)) for seed in range(2)]
    model = nnx.merge(nnx.graphdef(Llama4(CONFIG, rngs=nnx.Rngs(0))), params)
    logits_of = jax.jit(lambda ids, tiles: model(ids, tiles=tiles)[0])
    found = {1: [], 2: []}
    for batch in batches:
        for row in range(2):
            for document in range(1, 4):
                at = np.flatnonzero(batch["segment_ids"][row] == document)
                ids, learned = np.zeros(16, int), batch["loss_mask"][row, at]
                ids[: len(at)] = batch["ids"][row, at]  # padded behind, so that one program serves all
                logits = np.asarray(logits_of(ids[None], batch["tiles"][row, document - 1][None, None]), np.float64)[0]
                logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                predicted = np.flatnonzero(learned[1:])
                losses = -logprobs[predicted, ids[predicted + 1]]
                found[(document - 1) % 2 + 1].append((losses, logits[predicted].argmax(-1) == ids[predicted + 1]))
    result = evaluate(params, batches)
    for source, name in ((1, "first"), (2, "second")):
        losses, right = (np.concatenate(parts) for parts in zip(*found[source], strict=True))
        assert result["by_source"][name]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert result["by_source"][name]["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    everything = np.concatenate([losses for parts in found.values() for losses, _ in parts])
    assert result["loss"] == pytest.approx(everything.mean(), rel=1e-5)
    assert result["documents"] == 12
    assert set(result["loss_by_position"]) == {"3-6", "7-14", "15-30"} & set(result["loss_by_position"])


def test_a_document_is_exact_when_every_token_is_right(params):
    """Documents are rewritten to what the model says; one of them but for its last token."""
    batch = jax.tree.map(np.asarray, make_rows(CONFIG))
    model = nnx.merge(nnx.graphdef(Llama4(CONFIG, rngs=nnx.Rngs(0))), params)
    run = jax.jit(
        lambda b: model(b["ids"], tiles=b["tiles"], positions=b["positions"], segment_ids=b["segment_ids"])[0]
    )
    ids = batch["ids"].copy()
    for _ in range(16):
        said = np.asarray(run(batch | {"ids": ids})).argmax(-1)
        follows = np.roll(said, 1, axis=1)
        ids = np.where(batch["loss_mask"], follows, ids)
    wrong = np.flatnonzero(batch["segment_ids"][0] == 2)[-1]
    ids[0, wrong] = (ids[0, wrong] + 1) % 256
    result = evaluate(params, [batch | {"ids": ids}])
    assert result["documents"] == 6
    assert result["exact"] == pytest.approx(5 / 6, abs=1e-4)
    assert result["by_source"]["second"]["exact"] == 0.5  # of the two in the middle of a row
    assert result["accuracy"] < 1


def test_temperature_can_be_switched_off(params):
    batches = [make_rows(CONFIG)]
    on, off = evaluate(params, batches), evaluate(params, batches, attn_scale=0.0)
    assert not math.isclose(on["loss"], off["loss"], rel_tol=1e-6)
    assert evaluate(params, batches, attn_scale=CONFIG.text_config.attn_scale) == on


def test_only_so_many_batches(params):
    batches = [make_rows(CONFIG, seed=seed) for seed in range(3)]
    assert evaluate(params, batches, max_batches=2)["documents"] == 12


def test_no_document_is_an_error(params):
    with pytest.raises(ValueError, match="no document"):
        evaluate(params, [])
