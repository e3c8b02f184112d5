"""Routed experts over a mesh. Nothing is dropped, whatever the router does, and no device holds more than it must.

Experts lie on the `expert` axis, their widths on `tensor`, and each device routes its own tokens. Two forms:

- exchange, for many tokens: rows go to the devices that hold their expert and come back. A row travels straight to its
  place among the rows of its expert, so nothing is sorted on arrival. A device has room for twice its own tokens; if
  the router sends more to one of them, they come in as many rounds as that takes, usually one.
- gather, for few tokens (decoding) and where the compiler has no ragged exchange: every device of the group sees all
  tokens, computes the rows of its own experts, and the partial sums are added.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from l4jax.ops.low_precision import LowPrecision
from l4jax.sharding import axis_sizes, spec
from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.dispatch import target
from pallas_kernels.quantized import QuantizedArray

GATHER_BELOW = 1024
"""Tokens of an exchange group up to which all of them go to every device."""
ROOM = 2
"""Rows for which a device has room, over those of its own tokens."""
EXCHANGE = "expert_exchange"
"""What traced operations of an exchange are called, for `plan` to find them."""

Weights = Float[Array, "E D F"] | Any  # or a QuantizedArray


def routed_experts(
    x_BTD: Float[Array, "B T D"],
    experts_BTk: Int[Array, "B T k"],
    scores_BTk: Float[Array, "B T k"],
    gate_EDF: Weights,
    up_EDF: Weights,
    down_EFD: Weights,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, "E"]]:
    """Returns the sum over each token's experts of `expert(score * x)`, and the rows that each expert took.

    Args:
        x_BTD: tokens.
        experts_BTk: the experts of each token; E means none (padding).
        scores_BTk: what multiplies an expert's input, in the dtype of x.
        gate_EDF: with `up_EDF` and `down_EFD` the weights of all experts; or those of several layers, [L, E, D, F]
        layer: and which of these it is. Kernels read weights where they lie; a slice of the stack would be copied.
    """
    sizes = axis_sizes()
    weights = _Weights(gate_EDF, up_EDF, down_EFD, layer)
    if math.prod(sizes.values()) == 1:
        out, load = _local(_flat(x_BTD), _flat(experts_BTk), _flat(scores_BTk), weights)
        return out.reshape(x_BTD.shape), load
    tokens = spec(("batch", "length", None), x_BTD.shape, sizes)
    num_experts, leading = gate_EDF.shape[-3], (None,) * (gate_EDF.ndim - 3)
    wide, narrow = ("expert", "expert_embed", "expert_mlp"), ("expert", "expert_mlp", "expert_embed")

    def split(weight, axes):
        return jax.tree.map(lambda leaf: spec((*leading, *axes), leaf.shape, sizes), weight)

    places = _Weights(split(gate_EDF, wide), split(up_EDF, wide), split(down_EFD, narrow), PartitionSpec())
    token_axes, (expert_axes, _, partial_axes) = _axes(tokens), map(_axes, zip(spec(wide, gate_EDF.shape[-3:], sizes)))
    group = sizes["expert"] if expert_axes else 1
    shared = group > 1 and "expert" not in token_axes  # every device of the group has the same tokens
    num_tokens = math.prod(x_BTD.shape[:2]) // math.prod(sizes[axis] for axis in token_axes)  # of a device
    few = num_tokens * group <= GATHER_BELOW
    gather = shared or (group > 1 and (few or not _can_exchange(math.prod(sizes.values()))))

    def run(x, experts, scores, weights):
        weights = weights.gathered(places)
        shape, (x, experts, scores) = x.shape, map(_flat, (x, experts, scores))
        if group == 1:
            out, load = _local(x, experts, scores, weights)
        elif gather:
            out, load = _gather(x, experts, scores, weights, num_experts, shared)
        else:
            out, load = _exchange(x, experts, scores, weights, num_experts, token_axes)
        out = lax.psum(out, partial_axes) if partial_axes else out
        return out.reshape(shape), lax.psum(load, token_axes) if token_axes else load

    run = jax.shard_map(
        run, in_specs=(tokens, tokens, tokens, places), out_specs=(tokens, PartitionSpec()), check_vma=False
    )
    return run(x_BTD, experts_BTk, scores_BTk, weights)


def _can_exchange(num_devices: int) -> bool:
    """Whether the compiler has a ragged exchange: not for v5e beyond 16 chips, which route along their torus only."""
    return target().device_kind != "TPU v5 lite" or num_devices <= 16


def _axes(entries) -> tuple[str, ...]:
    """Returns the mesh axes in some entries of a partition."""
    found = [(entry,) if isinstance(entry, str) else entry for entry in entries if entry]
    return tuple(axis for entry in found for axis in entry)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Weights:
    """What experts multiply by; also where it lies. `layer` is None unless weights are stacked."""

    gate: Weights
    up: Weights
    down: Weights
    layer: Any

    @property
    def num_here(self) -> int:
        return self.gate.shape[-3]

    def gathered(self, places: "_Weights") -> "_Weights":
        """Returns the weights whole along the dimension that FSDP has shared out; the gradient is scattered back."""

        def whole(array: Array, place: PartitionSpec, axis: int) -> Array:
            axis += array.ndim
            axes = _axes(place[axis : axis + 1])
            return lax.all_gather(array, axes, axis=axis, tiled=True) if axes else array

        gate, up, down = (
            jax.tree.map(lambda w, place, axis=axis: whole(w, place, axis), weight, place)
            for weight, place, axis in (
                (self.gate, places.gate, -2),
                (self.up, places.up, -2),
                (self.down, places.down, -1),
            )
        )
        return _Weights(gate, up, down, self.layer)

    def __call__(self, rows_RD: Array, sizes_E: Array, offset: Array | None = None) -> Array:
        if isinstance(self.gate, LowPrecision):
            return self._low_precision(rows_RD, sizes_E, offset)
        hidden_RF = grouped_swiglu(rows_RD, self.gate, self.up, sizes_E, offset, self.layer)
        return grouped_matmul(hidden_RF, self.down, sizes_E, offset, self.layer)

    def _low_precision(self, rows_RD: Array, sizes_E: Array, offset: Array | None) -> Array:
        """The same, one product at a time: the gradient that comes back to each is rounded."""

        def product(x: Array, weight: LowPrecision) -> Array:
            def multiply(x, kernel):
                return grouped_matmul(x, kernel, sizes_E, offset, self.layer)

            return weight.product(multiply, x, (-1,), (-2,))

        gate_RF, up_RF = (product(rows_RD, weight).astype(jnp.float32) for weight in (self.gate, self.up))
        return product((jax.nn.silu(gate_RF) * up_RF).astype(rows_RD.dtype), self.down)


def _sort(x_MD, experts_Mk, scores_Mk, num_experts: int):
    """Returns the scaled rows sorted by expert, how many each expert has, and the order that sorted them."""
    top_k = experts_Mk.shape[1]
    experts_R = experts_Mk.reshape(-1)
    order_R = jnp.argsort(experts_R, stable=True)
    sizes_E = jnp.bincount(experts_R, length=num_experts).astype(jnp.int32)
    return x_MD[order_R // top_k] * scores_Mk.reshape(-1)[order_R, None], sizes_E, order_R


def _unsort(rows_RD, order_R, top_k: int):
    """Returns the sum of each token's rows."""
    return rows_RD[jnp.argsort(order_R)].reshape(-1, top_k, rows_RD.shape[-1]).sum(axis=1)


def _local(x_MD, experts_Mk, scores_Mk, weights):
    rows_RD, sizes_E, order_R = _sort(x_MD, experts_Mk, scores_Mk, weights.num_here)
    return _unsort(weights(rows_RD, sizes_E), order_R, experts_Mk.shape[1]), sizes_E


def _gather(x_mD, experts_mk, scores_mk, weights, num_experts: int, shared: bool):
    """All tokens of the group on every device, each for its own experts."""
    if not shared:
        x_mD, experts_mk, scores_mk = (
            lax.all_gather(a, "expert", tiled=True) for a in (x_mD, experts_mk, scores_mk)
        )  # fmt: skip
    rows_RD, sizes_E, order_R = _sort(x_mD, experts_mk, scores_mk, num_experts)
    offset = lax.axis_index("expert") * weights.num_here
    out_MD = _unsort(weights(rows_RD, sizes_E, offset), order_R, experts_mk.shape[1])
    if shared:
        return lax.psum(out_MD, "expert"), sizes_E
    # Each device has counted the tokens of the whole group.
    share_E = jnp.where(lax.axis_index("expert") == 0, sizes_E, 0)
    return lax.psum_scatter(out_MD, "expert", tiled=True), share_E


# --- Exchange -----------------------------------------------------------------------------------------------------


def _exchange(x_mD, experts_mk, scores_mk, weights, num_experts: int, token_axes):
    """Sends rows to the devices of their experts, applies these, sends the rows back."""
    rows_RD, sizes_E, order_R = _sort(x_mD, experts_mk, scores_mk, num_experts)
    sizes_pE = lax.all_gather(sizes_E, "expert")  # of every sender p
    group = sizes_pE.shape[0]
    sizes_dep = sizes_pE.reshape(group, group, -1).transpose(1, 2, 0)  # to device d, its expert e, from p
    most = lax.pmax(sizes_dep.sum((1, 2)).max(), token_axes)  # the same everywhere: all take part in every round
    num_rounds = -(-most // (ROOM * rows_RD.shape[0]))
    with jax.named_scope(EXCHANGE):
        matrices = weights.gate, weights.up, weights.down
        done_RD = _in_rounds(rows_RD, matrices, weights.layer, sizes_dep, num_rounds)
    return _unsort(done_RD, order_R, experts_mk.shape[1]), sizes_E


@jax.custom_vjp
def _in_rounds(rows_RD, matrices, layer, sizes_dep, num_rounds):
    """Returns what the experts make of rows sorted by expert. How many rounds that takes is known only at run time."""
    room_RD = jnp.zeros((ROOM * rows_RD.shape[0], rows_RD.shape[1]), rows_RD.dtype)

    def one_round(nth, done_RD):
        forth, back, here_e = _slices(sizes_dep, nth, len(room_RD))
        arrived = _send(rows_RD, room_RD, forth)
        return _send(_Weights(*matrices, layer)(arrived, here_e), done_RD, back)

    return lax.fori_loop(0, num_rounds, one_round, jnp.zeros_like(rows_RD))


def _in_rounds_forward(*arguments):
    return _in_rounds(*arguments), arguments


def _in_rounds_backward(arguments, d_done_RD):
    """Rows go forth again, beside the gradients of their results."""
    rows_RD, matrices, layer, sizes_dep, num_rounds = arguments
    room_RD = jnp.zeros((ROOM * rows_RD.shape[0], rows_RD.shape[1]), rows_RD.dtype)
    constant = isinstance(matrices[0], QuantizedArray)

    def one_round(nth, sums):
        d_rows_RD, d_matrices = sums
        forth, back, here_e = _slices(sizes_dep, nth, len(room_RD))

        def apply(rows, matrices):
            return _Weights(*matrices, layer)(rows, here_e)

        arrived, d_out = (_send(rows, room_RD, forth) for rows in (rows_RD, d_done_RD))
        if constant:
            _, backward = jax.vjp(lambda rows: apply(rows, matrices), arrived)
            (d_arrived,), d_of_round = backward(d_out), None
        else:
            _, backward = jax.vjp(apply, arrived, matrices)
            d_arrived, d_of_round = backward(d_out)
        return _send(d_arrived, d_rows_RD, back), jax.tree.map(jnp.add, d_matrices, d_of_round)

    zeros = jnp.zeros_like(rows_RD), None if constant else jax.tree.map(jnp.zeros_like, matrices)
    d_rows_RD, d_matrices = lax.fori_loop(0, num_rounds, one_round, zeros)
    return d_rows_RD, d_matrices, None, None, None


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _slices(sizes_dep: Int[Array, "d e p"], nth: Int[Array, ""], room: int):
    """Returns what travels in a round, forth and back, and how many rows each expert here gets.

    Slices are (device, expert): one sender's rows for one expert, in the order of experts. On arrival all rows of a
    device are ordered by expert, then by sender; a round takes the next `room` of this order.

    Args:
        sizes_dep: rows for device d, its expert e, from sender p.
    """
    group, me = sizes_dep.shape[0], lax.axis_index("expert")
    sizes_pde = sizes_dep.transpose(2, 0, 1)
    ends_pde = jnp.cumsum(sizes_pde.reshape(group, -1), axis=1).reshape(sizes_pde.shape)
    starts_dep = (ends_pde - sizes_pde).transpose(1, 2, 0)  # in the rows of the sender
    ends_dep = jnp.cumsum(sizes_dep.reshape(group, -1), axis=1).reshape(sizes_dep.shape) - nth * room
    first_dep, last_dep = (jnp.clip(edge, 0, room) for edge in (ends_dep - sizes_dep, ends_dep))
    now_dep = last_dep - first_dep
    starts_dep += jnp.clip(sizes_dep - ends_dep, 0, sizes_dep)  # without what went in earlier rounds

    def sent(of):  # by me, to each device
        return of[:, :, me].reshape(-1)

    def received(of):  # by me, from each device
        return of[me].T.reshape(-1)

    forth = _Slices(sent(starts_dep), sent(now_dep), sent(first_dep), received(now_dep))
    back = _Slices(received(first_dep), received(now_dep), received(starts_dep), sent(now_dep))
    return forth, back, now_dep[me].sum(axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Slices:
    """Where runs of rows lie: as many for each device of the group."""

    starts: Int[Array, " n"]
    """In the sender's rows."""
    sizes: Int[Array, " n"]
    places: Int[Array, " n"]
    """In the receiver's rows."""
    arriving: Int[Array, " n"]
    """Sizes of the runs that come here, by sender."""


def _send(rows_RD, into_SD, slices: _Slices):
    """Returns `into_SD` with the rows that the group sends here in their places."""
    if target().platform == "cpu":
        return _send_emulated(rows_RD, into_SD, slices)
    return lax.ragged_all_to_all(
        rows_RD, into_SD, slices.starts, slices.sizes, slices.places, slices.arriving, axis_name="expert"
    )


def _send_emulated(rows_RD, into_SD, slices: _Slices):
    """The same by a gather of everything: XLA:CPU has no ragged exchange."""
    group = lax.axis_size("expert")
    row_R = jnp.arange(rows_RD.shape[0])
    in_slice_Rn = (row_R[:, None] >= slices.starts) & (row_R[:, None] < slices.starts + slices.sizes)
    slice_R, sent_R = in_slice_Rn.argmax(axis=1), in_slice_Rn.any(axis=1)
    device_R = jnp.where(sent_R, slice_R // (len(slices.sizes) // group), group)
    place_R = slices.places[slice_R] + row_R - slices.starts[slice_R]
    rows_pRD, device_pR, place_pR = (lax.all_gather(a, "expert") for a in (rows_RD, device_R, place_R))
    place_pR = jnp.where(device_pR == lax.axis_index("expert"), place_pR, into_SD.shape[0])
    return into_SD.at[place_pR.reshape(-1)].set(rows_pRD.reshape(-1, rows_RD.shape[1]), mode="drop")
