"""One optimizer step, jitted once for the shapes of a run."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l4jax.train.balance import update_router_bias
from l4jax.train.config import ParallelConfig
from l4jax.train.loss import next_token_targets
from l4jax.train.objective import Numbers, Objective, Rows
from l4jax.train.state import TrainState, join, path_name, split

Batch = dict[str, jax.Array]
"""ids, positions, segment_ids, loss_mask, source_ids, pictures [B, T], tiles [B, n, 3, S, S] or None
(`data/packing.py`)."""
BATCH_AXES = {
    **dict.fromkeys(("ids", "positions", "segment_ids", "loss_mask", "source_ids", "pictures"), ("batch", "length")),
    "tiles": ("batch", None, None, None, None),
}

GROUPS = {
    "vision": "vision_model|multi_modal_projector",
    "embedding": "embed_tokens",
    "head": "lm_head",
    "norm": r".*(layernorm|norm)\b",
    "attention": r".*self_attn",
    "router": r".*router",
    "experts": r".*\.experts",
    "dense": r".*feed_forward",
    "other": "",
}
"""Parameters by the start of their path, the first match counts: for the norms of gradients and updates."""

CORNER = 32  # numbers along each axis


def group_of(path: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.match(pattern, path))


def norms(tree: Any) -> dict[str, jax.Array]:
    """Returns the norm of all parameters of each group together, float32."""
    squares: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        squares.setdefault(group_of(path_name(path)), []).append(jnp.square(leaf.astype(jnp.float32)).sum())
    return {group: jnp.sqrt(sum(parts)) for group, parts in squares.items()}


def gradients(loss_of: Callable, params: Any, rows: Rows, total: jax.Array, microbatches: int):
    """Returns the gradient of `loss_of(params, rows) -> loss, numbers`, the loss and the numbers, added up over parts
    of the batch."""
    value_and_gradient = jax.value_and_grad(loss_of, has_aux=True)

    def of(rows):
        (loss, numbers), grads = value_and_gradient(params, rows | {"total": total})
        return grads, loss, numbers

    if microbatches == 1:
        return of(rows)

    def split_rows(x):  # every n-th row, so that each device keeps its own rows
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def one_part(sums, part):
        return jax.tree.map(jnp.add, sums, of(part)), None

    parts = jax.tree.map(split_rows, rows)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(one_part, zeros, parts)[0]


def count_targets(batch: Batch) -> tuple[Rows, jax.Array]:
    """Returns the batch with `targets` and `counts`, and the number of tokens that count, float32."""
    targets_BT, counts_BT = next_token_targets(batch["ids"], batch["segment_ids"], batch["loss_mask"])
    return batch | {"targets": targets_BT, "counts": counts_BT}, counts_BT.sum(dtype=jnp.float32)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    parallel: ParallelConfig,
    shardings: TrainState,
    *,
    router_bias_rate: float = 0.0,
    trainable: str = "",
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Numbers]]:
    """Returns the jitted `step(state, batch, fixed) -> state, numbers`; the state that goes in is donated.

    A step whose loss or gradient is not finite moves no weight, and to the optimizer its gradient is zero;
    `numbers["finite"]` says so.

    Args:
        objective: what is minimised; `fixed` is handed to it.
        shardings: of the state, before and after the step: `state.state_shardings`.
        router_bias_rate: of `balance.update_router_bias`.
        trainable: regular expression of the parameters that learn; for others there is neither gradient nor moment.
        ema_decay: of the running mean of the weights, if the state has one.
    """

    def train_step(state: TrainState, batch: Batch, fixed: Any):
        rows, num_tokens = count_targets(batch)
        learning, frozen = split(state.params, trainable)

        def loss_of(learning, rows):
            return objective(join(learning, frozen), rows, fixed, state.router_bias, state.step)

        total = jnp.maximum(num_tokens, 1.0)
        grads, loss, numbers = gradients(loss_of, learning, rows, total, parallel.microbatches)
        grad_norms = norms(grads)
        grad_norm = jnp.sqrt(sum(jnp.square(norm) for norm in grad_norms.values()))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        # No choice between the new state and the old one: that would keep both in memory.
        opt_state = to_device(state.opt_state) if parallel.offload_optimizer else state.opt_state
        updates, opt_state = optimizer.update(grads, opt_state, learning)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0.0), updates)
        params = join(optax.apply_updates(learning, updates), frozen)
        rate = jnp.where(finite, router_bias_rate, 0.0)
        router_bias = update_router_bias(state.router_bias, numbers.get("router_load"), rate)
        ema = state.ema and jax.tree.map(lambda mean, p: mean + (1 - ema_decay) * (p - mean), state.ema, params)
        numbers |= {
            "loss_now": loss,
            "finite": finite,
            "all_tokens": (batch["segment_ids"] > 0).sum(),
            "grad_norm": grad_norm,
            "grad_norms": grad_norms,
            # libtpu 0.0.42.1 refuses to schedule the corners of shared arrays beside a ragged exchange.
            "update_ratios": update_ratios(updates, learning) if shardings.step.mesh.size == 1 else {},
        }
        return TrainState(params, opt_state, state.step + 1, router_bias, ema), numbers

    def to_device(opt_state):
        return jax.tree.map(
            lambda x, place: jax.device_put(x, place.with_memory_kind("device")), opt_state, shardings.opt_state
        )

    everywhere = shardings.step  # so that every process can read the numbers
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere))


def update_ratios(updates: Any, weights: Any) -> dict[str, jax.Array]:
    """Returns how long each group's update is, relative to its weights, by a sample of both: a corner of every array.

    Norms of whole updates would be another pass over memory, or another copy.
    """

    def corner(x: jax.Array) -> jax.Array:
        return x[tuple(slice(0, CORNER) for _ in x.shape)]

    updates, weights = (norms(jax.tree.map(corner, tree)) for tree in (updates, weights))
    return {group: updates[group] / jnp.maximum(weights[group], 1e-20) for group in updates}
