"""The loss of pre-training and supervised stages: cross entropy of the next token, on the tokens that count."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from l4jax.model.llama4 import head_logits
from l4jax.sharding import split_size


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


LOGITS_AT_ONCE = 1 << 28
"""Logits that a device holds at a time; 1 GiB in float32. Scout's vocabulary times 8,192 tokens would take 6.6 GB."""


class TokenLosses(NamedTuple):
    """Of each position; both float32 whatever the dtype of the logits."""

    losses: Float[Array, "B T"]
    """-log p(target)."""
    right: Float[Array, "B T"]
    """1 where no token is likelier than the target, else 0."""


def head_losses(
    hidden_BTD: Float[Array, "B T D"], kernel_DV: Float[Array, "D V"], targets_BT: Int[Array, "B T"]
) -> TokenLosses:
    """Returns the losses of `hidden @ kernel`, a block of positions at a time; logits of a block are made again in the
    backward pass rather than kept."""

    def block_losses(hidden_BTD, targets_BT):
        return token_losses(head_logits(hidden_BTD, kernel_DV), targets_BT)

    (B, T, _), V = hidden_BTD.shape, kernel_DV.shape[1]
    num_parts = split_size("length", T)
    here = B * T * V // (num_parts * split_size("dense_batch", B) * split_size("vocab", V))  # logits of a device
    part = T // num_parts
    num_blocks = next(n for n in range(1, part + 1) if part % n == 0 and (n == part or here // n <= LOGITS_AT_ONCE))
    if num_blocks == 1:
        return block_losses(hidden_BTD, targets_BT)

    def cut(x):  # every device's part of the sequence gives a piece to every block
        pieces = x.reshape(B, num_parts, num_blocks, part // num_blocks, *x.shape[2:])
        return jnp.moveaxis(pieces, 2, 0).reshape(num_blocks, B, T // num_blocks, *x.shape[2:])

    def join(x):
        pieces = x.reshape(num_blocks, B, num_parts, part // num_blocks)
        return jnp.moveaxis(pieces, 0, 2).reshape(B, T)

    one_block = jax.checkpoint(lambda block: block_losses(*block))
    found = jax.lax.map(one_block, (cut(hidden_BTD), cut(targets_BT)))
    return TokenLosses(*map(join, found))


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
