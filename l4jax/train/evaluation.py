"""Evaluation on held-out documents: loss, accuracy, and how many documents are right from the first token to the last.

It computes as training does, in few bits too, but without the balancing bias: the model that comes out has none.
Greedy decoding would say exactly these tokens, so a document counts as right when each of its tokens that count is the
likeliest after the true ones before it. Nothing has to be generated, and packed rows do.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from l4jax.config import Llama4Config
from l4jax.model.llama4 import Llama4
from l4jax.model.params import abstract_model
from l4jax.sharding import batch_part, place
from l4jax.train.config import EvaluateConfig, ParallelConfig
from l4jax.train.loss import head_losses
from l4jax.train.objective import computing_model, sum_by
from l4jax.train.step import BATCH_AXES, Batch, count_targets

POSITION_BUCKETS = 24
"""The k-th holds positions from 2^k - 1 up to 2^(k+1) - 2: the first token, then two, four, eight, ..."""


class Evaluation:
    """One evaluation; `run` may be called as often as wanted, and compiles once."""

    def __init__(
        self,
        config: Llama4Config,
        wanted: EvaluateConfig,
        batches: Sequence[grain.IterDataset],
        parallel: ParallelConfig,
        mesh: Mesh,
        rows: int,
    ):
        """Describes the evaluation.

        Args:
            config: of the model.
            wanted: what to evaluate.
            batches: finite ones, of each source; the same in every process, so that all take part in every step.
            parallel: precision of computation.
            mesh: devices to compute on.
            rows: of a batch.
        """
        self.every, self._max_batches, self._batches = wanted.every, wanted.max_batches, batches
        self._mesh, self._part = mesh, batch_part(mesh, rows)
        self._source_names = list(wanted.sources)
        if wanted.attn_scale is not None:
            text = dataclasses.replace(config.text_config, attn_scale=wanted.attn_scale)
            config = dataclasses.replace(config, text_config=text)
        # Structure alone: the same parameters, at another temperature.
        graphdef = nnx.graphdef(abstract_model(config, dtype=jnp.dtype(parallel.compute_dtype)))

        def sums(params: dict[str, Any], batch: Batch):
            return _sums(computing_model(graphdef, params, parallel), batch, len(self._source_names))

        everywhere = NamedSharding(mesh, PartitionSpec())  # so that every process can read the numbers
        self._sums = jax.jit(sums, out_shardings=everywhere)

    def is_due(self, step: int, last: int) -> bool:
        """Whether to evaluate after a step."""
        return step == last or (self.every > 0 and step % self.every == 0)

    def run(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns `loss`, `accuracy` (of tokens) and `exact` (of documents), each also `by_source`; the loss by
        position."""
        total = None
        for of_source in self._batches:
            with contextlib.closing(iter(of_source)) as batches:
                for batch in itertools.islice(batches, self._max_batches or None):
                    found = jax.device_get(self._sums(params, self._place(batch)))
                    total = found if total is None else jax.tree.map(np.add, total, found)
        if total is None:
            raise ValueError("an evaluation has no document; check its sources under evaluate")
        return self._summary(total)

    def _place(self, batch: dict[str, np.ndarray | None]) -> Batch:
        """Hands over this process's part of the rows."""
        index, count = self._part

        def part(rows: np.ndarray | None) -> np.ndarray | None:
            return None if rows is None else np.split(rows, count)[index]

        return place({name: part(rows) for name, rows in batch.items()}, self._mesh, BATCH_AXES, count)

    def _summary(self, total: dict[str, np.ndarray]) -> dict[str, Any]:
        def ratio(name: str, over: str, at=slice(None)) -> float:
            return round(float(total[name][at].sum() / max(total[over][at].sum(), 1)), 6)

        pairs = (("loss", "tokens"), ("accuracy", "tokens"), ("exact", "documents"))
        by_position = {
            f"{2**k - 1}-{2 ** (k + 1) - 2}": round(float(loss / count), 6)
            for k, (loss, count) in enumerate(zip(total["loss_at"], total["tokens_at"], strict=True))
            if count
        }
        return {
            **{name: ratio(name, over) for name, over in pairs},
            "documents": int(total["documents"].sum()),
            "by_source": {
                source: {name: ratio(name, over, slice(i, i + 1)) for name, over in pairs}
                for i, source in enumerate(self._source_names)
                if total["documents"][i]
            },
            "loss_by_position": by_position,
        }


def _sums(model: Llama4, batch: Batch, num_sources: int) -> dict[str, Float[Array, "b"]]:
    rows, _ = count_targets(batch)
    hidden_BTD, _, _ = model.hidden(
        rows["ids"],
        tiles=rows["tiles"],
        positions=rows["positions"],
        segment_ids=rows["segment_ids"],
    )
    losses_BT, right_BT = head_losses(hidden_BTD, model.lm_head.kernel[...], rows["targets"])
    ones_BT, source_BT, counts_BT = jnp.ones_like(losses_BT), rows["source_ids"] - 1, rows["counts"]
    is_document_BT, exact_BT = _exact(right_BT > 0, counts_BT, rows["segment_ids"])
    octave_BT = jnp.log2(rows["positions"].astype(jnp.float32) + 1).astype(jnp.int32)
    return {
        "loss": sum_by(losses_BT, counts_BT, source_BT, num_sources),
        "accuracy": sum_by(right_BT, counts_BT, source_BT, num_sources),
        "tokens": sum_by(ones_BT, counts_BT, source_BT, num_sources),
        "exact": sum_by(exact_BT, is_document_BT, source_BT, num_sources),
        "documents": sum_by(ones_BT, is_document_BT, source_BT, num_sources),
        "loss_at": sum_by(losses_BT, counts_BT, octave_BT, POSITION_BUCKETS),
        "tokens_at": sum_by(ones_BT, counts_BT, octave_BT, POSITION_BUCKETS),
    }


def _exact(right_BT, counts_BT, segment_ids_BT: Int[Array, "B T"]):
    """Returns at which tokens a document with something to say ends, and there 1 if it was right throughout."""
    follows_BT = jnp.roll(segment_ids_BT, -1, axis=1).at[:, -1].set(-1)
    last_BT = (segment_ids_BT > 0) & (follows_BT != segment_ids_BT)

    def since_start(flags_BT):  # how many up to here, in this document
        count_BT = jnp.cumsum(flags_BT, axis=1)
        before_BT = jnp.where(last_BT, count_BT, 0)
        before_BT = jnp.pad(jax.lax.cummax(before_BT, axis=1)[:, :-1], ((0, 0), (1, 0)))
        return count_BT - before_BT

    wrong_BT = since_start(counts_BT & ~right_BT)
    return last_BT & (since_start(counts_BT) > 0), (wrong_BT == 0).astype(jnp.float32)
