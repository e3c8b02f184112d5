"""What follows from logits, without ever holding those of all tokens: with 202,048 words a token has 0.8 MB of them.

Weights of the head are gathered once, and blocks of positions pass through them. The backward pass makes the logits of
each block again, adds up the gradient of the weights in float32 on each device, and reduces it over devices once.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from l4jax.sharding import MESH_AXES, axis_sizes, spec

LOGITS_AT_ONCE = 1 << 28
"""Logits that a device holds at a time; 1 GiB in float32."""

TENSOR = "tensor"


def map_logits(
    function: Callable[..., Any],
    head: Callable[[Array, Array], Array],
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    others: Any,
) -> Any:
    """Returns `function(logits, others)` for all positions, differentiable in `hidden` and `kernel`.

    Args:
        function: of logits [b, t, V] and of the same block of `others`; gives a tree of [b, t, ...], position by
            position.
        head: makes logits of hidden and kernel.
        others: tree of arrays [B, T, ...]: targets.
    """
    sizes = axis_sizes()
    if math.prod(sizes.values()) == 1:
        return _map_blocks(function, head, (), LOGITS_AT_ONCE, hidden, kernel, others)
    tokens = spec(("batch", "length"), hidden.shape[:2], sizes)
    place = spec(("embed", None), kernel.shape, sizes)
    at_once = LOGITS_AT_ONCE * sizes[TENSOR]  # that axis stays with the compiler, which splits the vocabulary over it
    gathered = () if place[0] is None else (place[0],) if isinstance(place[0], str) else place[0]
    run = functools.partial(_map_blocks, function, head, gathered, at_once)
    # Every output has positions first, so one spec fits them all.
    return jax.shard_map(
        run,
        in_specs=(tokens, place, tokens),
        out_specs=tokens,
        axis_names=set(MESH_AXES) - {TENSOR},
        check_vma=False,
    )(hidden, kernel, others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _map_blocks(function, head, gathered: tuple[str, ...], at_once: int, hidden, kernel, others):
    return _forward(function, head, gathered, at_once, hidden, kernel, others)[0]


def _num_blocks(hidden, kernel, at_once: int) -> int:
    (B, T, _), V = hidden.shape, kernel.shape[1]
    return next(n for n in range(1, T + 1) if T % n == 0 and (n == T or B * T // n * V <= at_once))


def _cut(tree, num_blocks: int):
    """Returns arrays [B, T, ...] as [num_blocks, B, T / num_blocks, ...]."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 1, 0), tree
    )  # fmt: skip


def _join(tree):
    """The inverse of `_cut`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), tree)


def _whole(kernel, gathered):
    return lax.all_gather(kernel, gathered, axis=0, tiled=True) if gathered else kernel


def _forward(function, head, gathered, at_once, hidden, kernel, others):
    whole = _whole(kernel, gathered)
    num_blocks = _num_blocks(hidden, whole, at_once)
    if num_blocks == 1:  # then the logits may as well be kept
        found, backward = jax.vjp(lambda h, w: function(head(h, w), others), hidden, whole)
        return found, (backward, kernel, None)
    found = lax.map(lambda block: function(head(block[0], whole), block[1]), _cut((hidden, others), num_blocks))
    return _join(found), (hidden, kernel, others)


def _backward(function, head, gathered, at_once, residuals, cotangents):
    hidden, kernel, others = residuals
    if others is None:
        d_hidden, d_whole = hidden(cotangents)
    else:
        whole = _whole(kernel, gathered)
        num_blocks = _num_blocks(hidden, whole, at_once)

        def visit(d_whole, block):
            hidden, others, cotangents = block
            _, backward = jax.vjp(lambda h, w: function(head(h, w), others), hidden, whole)
            d_hidden, d_block = backward(cotangents)
            return d_whole + d_block.astype(jnp.float32), d_hidden

        blocks = _cut((hidden, others, cotangents), num_blocks)
        d_whole, d_hidden = lax.scan(visit, jnp.zeros(whole.shape, jnp.float32), blocks)
        d_hidden = _join(d_hidden)
    d_whole = d_whole.astype(kernel.dtype)
    d_kernel = lax.psum_scatter(d_whole, gathered, tiled=True) if gathered else d_whole
    return d_hidden, d_kernel, jax.tree.map(lambda _: None, others)


_map_blocks.defvjp(_forward, _backward)
