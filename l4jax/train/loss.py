"""The loss of pre-training and supervised stages: cross entropy of the next token, on the tokens that count."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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


def token_losses(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns -log p(target) at each position, in float32 whatever the dtype of the logits."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def masked_mean(values_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> tuple[Array, Array]:
    """Returns the mean over the marked positions of the whole batch, and their number (float32).

    The mean is over tokens, never over rows or devices: a row with few answers weighs little. With no marked position
    it is 0.
    """
    count = mask_BT.sum(dtype=jnp.float32)
    return jnp.where(mask_BT, values_BT, 0.0).sum() / jnp.maximum(count, 1.0), count
