"""The loss of pre-training and supervised stages: cross entropy of the next token, on the tokens that count."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l4jax import ops
from l4jax.model.llama4 import head_logits


def next_token_targets(
    ids_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], loss_mask_BT: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns for every position the id that follows it, and whether predicting that id counts.

    `loss_mask_BT` marks tokens that are worth learning (answers). A token that opens a document counts never: nothing
    in its own document comes before it.
    """
    follows_BT = jnp.roll(segment_ids_BT, -1, axis=1).at[:, -1].set(0)
    wanted_BT = jnp.roll(loss_mask_BT, -1, axis=1)
    return jnp.roll(ids_BT, -1, axis=1), wanted_BT & (follows_BT == segment_ids_BT) & (segment_ids_BT > 0)


class TokenLosses(NamedTuple):
    """Of each position; both float32 whatever the dtype of the logits."""

    losses: Float[Array, "B T"]
    """-log p(target)."""
    right: Float[Array, "B T"]
    """1 where no token is likelier than the target, else 0."""


def head_losses(
    hidden_BTD: Float[Array, "B T D"], kernel_DV: Float[Array, "D V"], targets_BT: Int[Array, "B T"]
) -> TokenLosses:
    """Returns the losses of the logits `hidden @ kernel`, a block of positions at a time."""
    return ops.map_logits(token_losses, head_logits, hidden_BTD, kernel_DV, targets_BT)


@jax.custom_vjp
def token_losses(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> TokenLosses:
    """Returns -log p(target), and whether the target is the likeliest token."""
    return _token_losses(logits_BTV, targets_BT)[0]


def _token_losses(logits_BTV, targets_BT):
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    largest_BT = logits_BTV.max(-1)
    lse_BT = largest_BT + jnp.log(jnp.exp(logits_BTV - largest_BT[..., None]).sum(-1))
    return TokenLosses(lse_BT - chosen_BT, (chosen_BT >= largest_BT).astype(jnp.float32)), lse_BT


def _token_losses_forward(logits_BTV, targets_BT):
    found, lse_BT = _token_losses(logits_BTV, targets_BT)
    return found, (logits_BTV, targets_BT, lse_BT)


def _token_losses_backward(residuals, cotangents):
    # One pass over the logits; the gradient of a gather would be a scatter into a second array of their size.
    logits_BTV, targets_BT, lse_BT = residuals
    weights_BT1 = cotangents.losses[..., None]
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    shares_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - lse_BT[..., None])
    return ((shares_BTV - is_target_BTV) * weights_BT1).astype(logits_BTV.dtype), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def masked_sum(values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Returns the sum over the marked positions.

    Divided by their number in the whole batch it is the loss: the mean is over tokens, never over rows, devices or
    microbatches, so that a row with few answers weighs little.
    """
    return jnp.where(mask_BT, values_BT, 0.0).sum()
