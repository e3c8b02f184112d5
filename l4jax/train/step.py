"""One optimizer step, jitted once for the shapes of a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l4jax.train.balance import update_router_bias
from l4jax.train.config import ParallelConfig
from l4jax.train.loss import head_losses, masked_sum, next_token_targets
from l4jax.train.state import TrainState

Batch = dict[str, jax.Array]
"""ids, positions, segment_ids, loss_mask, source_ids [B, T], tiles [B, n, 3, S, S] or None (`data/packing.py`)."""
BATCH_AXES = {
    "ids": ("batch", "length"),
    "positions": ("batch", "length"),
    "segment_ids": ("batch", "length"),
    "loss_mask": ("batch", "length"),
    "source_ids": ("batch", "length"),
    "tiles": ("batch", None, None, None, None),
}


def forward(
    graphdef: nnx.GraphDef, params: dict[str, Any], rows: Batch, router_bias, parallel: ParallelConfig
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the sum of the losses of some rows over `rows["total"]`, the tokens that count in the whole batch, and
    what is worth knowing besides."""
    model = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(parallel.compute_dtype), params))
    hidden_BTD, _, load_LE = model.hidden(
        rows["ids"],
        tiles=rows["tiles"],
        positions=rows["positions"],
        segment_ids=rows["segment_ids"],
        router_bias=router_bias,
        remat=parallel.remat,
    )
    losses_BT, right_BT = head_losses(hidden_BTD, model.lm_head.kernel[...], rows["targets"])
    loss = masked_sum(losses_BT, rows["counts"]) / rows["total"]
    right = masked_sum(right_BT, rows["counts"]) / rows["total"]
    return loss, {"loss": loss, "accuracy": right, "router_load": load_LE}


def gradients(loss_of: Callable, params: dict[str, Any], rows: Batch, total: jax.Array, microbatches: int):
    """Returns the gradient of `loss_of(params, rows)` and its numbers, added up over parts of the batch."""
    gradient_of = jax.grad(loss_of, has_aux=True)
    if microbatches == 1:
        return gradient_of(params, rows | {"total": total})

    def split(x):  # every n-th row, so that each device keeps its own rows
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def one_part(sums, part):
        return jax.tree.map(jnp.add, sums, gradient_of(params, part | {"total": total})), None

    parts = jax.tree.map(split, rows)
    shapes = jax.eval_shape(gradient_of, params, jax.tree.map(lambda x: x[0], parts) | {"total": total})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(one_part, zeros, parts)[0]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    parallel: ParallelConfig,
    router_bias_rate: float,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted `step(state, batch) -> state, metrics`; the state that goes in is donated.

    Args:
        shardings: of the state, before and after the step: `state.state_shardings`.
    """

    def train_step(state: TrainState, batch: Batch):
        targets_BT, counts_BT = next_token_targets(batch["ids"], batch["segment_ids"], batch["loss_mask"])
        num_tokens = counts_BT.sum(dtype=jnp.float32)

        def loss_of(params, rows):
            return forward(graphdef, params, rows, state.router_bias, parallel)

        rows = batch | {"targets": targets_BT, "counts": counts_BT}
        total = jnp.maximum(num_tokens, 1.0)
        grads, metrics = gradients(loss_of, state.params, rows, total, parallel.microbatches)
        opt_state = to_device(state.opt_state) if parallel.offload_optimizer else state.opt_state
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        router_bias = update_router_bias(state.router_bias, metrics["router_load"], router_bias_rate)
        metrics |= {"grad_norm": optax.tree.norm(grads), "answer_tokens": num_tokens}
        metrics["tokens"] = (batch["segment_ids"] > 0).sum()
        return TrainState(params, opt_state, state.step + 1, router_bias), metrics

    def to_device(opt_state):
        return jax.tree.map(
            lambda x, place: jax.device_put(x, place.with_memory_kind("device")), opt_state, shardings.opt_state
        )

    everywhere = shardings.step  # so that every process can read the numbers
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere))
