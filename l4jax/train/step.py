"""One optimizer step, jitted once for the shapes of a run."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from l4jax.train.balance import update_router_bias
from l4jax.train.config import RunConfig
from l4jax.train.loss import head_losses, masked_mean, next_token_targets
from l4jax.train.state import TrainState

Batch = dict[str, jax.Array]
"""ids, positions, segment_ids, loss_mask [B, T] and tiles [B, n, 3, S, S], as `data/pipeline.py` makes them."""


def forward(graphdef: nnx.GraphDef, params: dict[str, Any], batch: Batch, router_bias) -> tuple[jax.Array, Any]:
    """Returns the mean loss over the answer tokens of the batch, and what is worth knowing besides."""
    model = nnx.merge(graphdef, params)
    hidden_BTD, _, load_LE = model.hidden(
        batch["ids"],
        tiles=batch["tiles"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        router_bias=router_bias,
    )
    targets_BT, counts_BT = next_token_targets(batch["ids"], batch["segment_ids"], batch["loss_mask"])
    losses_BT, right_BT = head_losses(hidden_BTD, model.lm_head.kernel[...], targets_BT)
    loss, tokens = masked_mean(losses_BT, counts_BT)
    right, _ = masked_mean(right_BT, counts_BT)
    return loss, {"loss": loss, "accuracy": right, "answer_tokens": tokens, "router_load": load_LE}


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: RunConfig, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted `step(state, batch) -> state, metrics`; the state that goes in is donated.

    Args:
        shardings: of the state, before and after the step: `state.state_shardings`.
    """

    def train_step(state: TrainState, batch: Batch):
        def loss_of(params):
            return forward(graphdef, params, batch, state.router_bias)

        grads, metrics = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        router_bias = update_router_bias(state.router_bias, metrics["router_load"], config.router_bias_rate)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(params, opt_state, state.step + 1, router_bias), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
