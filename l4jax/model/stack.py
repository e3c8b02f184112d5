"""Layers, stacked by cycle and scanned: compile time does not grow with depth.

The kinds of layers repeat with a period, the cycle. Blocks at the same place of the cycle have the same shape, so their
weights are stacked over the C cycles and one `lax.scan` walks over them; inside, the place in the cycle is a Python
fact. Layers beyond the last whole cycle, or all of them where scanning does not pay (XLA:CPU copies the weights that a
scan slices), form the tail, each with weights of its own.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention", "attention_lse"),
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}
"""What layers keep for the backward pass: everything; nothing but their inputs, the rest is made again; the output of
attention besides; or all products with weights."""


def rematerialize(apply: Callable, name: str, *, in_scan: bool) -> Callable:
    """Returns `apply(block, x, state, index, input)` that keeps for its gradient what the named policy says.

    Args:
        in_scan: there nothing could be merged with what is made again; elsewhere a fence is needed against it.

    Raises:
        ValueError: there is no such policy.
    """
    if name not in REMAT:
        raise ValueError(f"remat={name!r} is not one of {', '.join(REMAT)}")
    if name == "none":
        return apply

    def with_weights(block, x, state, index, value):
        graphdef, weights = nnx.split(block)

        @functools.partial(jax.checkpoint, policy=REMAT[name], prevent_cse=not in_scan)
        def run(weights, x, state, index, value):
            return apply(nnx.merge(graphdef, weights), x, state, index, value)

        return run(weights, x, state, index, value)

    return with_weights


class Layers(NamedTuple):
    """One thing for each layer, arranged like the weights: P entries with a leading cycle axis, and the tail."""

    cycle: tuple[Any, ...]
    tail: tuple[Any, ...]


class Stack(nnx.Module):
    """Layer l = c * P + p is entry p of `cycle`, at index c of the leading axis; from C * P on, an entry of `tail`."""

    def __init__(
        self,
        make_block: Callable[[int, nnx.Rngs], nnx.Module],
        num_layers: int,
        cycle_length: int,
        *,
        scan: bool,
        rngs: nnx.Rngs,
    ):
        self.num_cycles = num_layers // cycle_length if scan else 0
        in_cycle = range(cycle_length if self.num_cycles else 0)
        self.cycle = nnx.List([self._stacked(make_block, p, rngs) for p in in_cycle])
        self.tail = nnx.List([make_block(layer, rngs) for layer in range(self.num_cycles * len(in_cycle), num_layers)])

    def _stacked(self, make_block, p: int, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.vmap(lambda keys: make_block(p, keys))(rngs.split(self.num_cycles))

    def arrange(self, per_layer: list[Any]) -> Layers:
        """Returns a list with one pytree a layer (or None) in the arrangement of the weights."""
        period = len(self.cycle)
        columns = [per_layer[p : self.num_cycles * period : period] for p in range(period)]
        stacked = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *column) for column in columns)
        return Layers(stacked, tuple(per_layer[self.num_cycles * period :]))

    def flatten(self, layers: Layers) -> list[Any]:
        """The inverse of `arrange`."""
        take = operator.itemgetter
        cycles = [jax.tree.map(take(c), slot) for c in range(self.num_cycles) for slot in layers.cycle]
        return [*cycles, *layers.tail]

    def __call__(
        self, apply: Callable, x, states: Layers | None = None, inputs: Layers | None = None, remat: str = "none"
    ):
        """Runs every layer in order: `x, state, output = apply(block, x, state, index, input)`.

        Args:
            apply: one layer. `state` is the stacked state of its place in the cycle and `index` the cycle it is in.
            x: what flows through the layers.
            states: travels along and is updated in place (the KV cache); leaves have a leading axis of C (tail: 1).
            inputs: read by each layer; leaves in `cycle` have a leading axis of C.
            remat: one of `REMAT`: what a layer keeps for the backward pass.

        Returns:
            x, the new states, the outputs of all layers arranged likewise.
        """
        apply_in_cycle, apply_in_tail = (rematerialize(apply, remat, in_scan=in_scan) for in_scan in (True, False))
        nothing = Layers((None,) * len(self.cycle), (None,) * len(self.tail))
        states, inputs = states or nothing, inputs or nothing
        graphdef, weights = nnx.split(self.cycle)

        def one_cycle(carry, scanned):
            x, states = carry
            index, weights, inputs = scanned
            new_states, outputs = [], []
            for block, state, value in zip(nnx.merge(graphdef, weights), states, inputs, strict=True):
                x, state, output = apply_in_cycle(block, x, state, index, value)
                new_states.append(state)
                outputs.append(output)
            return (x, tuple(new_states)), tuple(outputs)

        cycle_states, cycle_outputs = states.cycle, ()
        if self.num_cycles:
            scanned = (jnp.arange(self.num_cycles), weights, inputs.cycle)
            (x, cycle_states), cycle_outputs = jax.lax.scan(one_cycle, (x, states.cycle), scanned)

        tail_states, tail_outputs = [], []
        for block, state, value in zip(self.tail, states.tail, inputs.tail, strict=True):
            x, state, output = apply_in_tail(block, x, state, 0, value)
            tail_states.append(state)
            tail_outputs.append(output)
        return x, Layers(cycle_states, tuple(tail_states)), Layers(cycle_outputs, tuple(tail_outputs))
