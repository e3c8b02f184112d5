"""The one home of mesh axes, logical axes and the rules between them.

Modules name *logical* axes only (`"embed"`, `"heads"`, `"expert"`, ...); a table says which mesh axes carry each. There
is always a mesh: a laptop has a mesh of ones, where every constraint is free.

The mesh axes: `data` copies the weights (and is the axis that crosses slices), `fsdp` shares them out and gathers them
for use, `expert` holds different experts and exchanges tokens, `tensor` splits heads and widths, `context` splits the
sequence.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l4jax.config import Llama4Config

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

LogicalAxes = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes that split it, the major one first. What is not listed is whole everywhere.

    An array takes as many of the mesh axes, from the first on, as divide its dimension: a vision tower need not be as
    divisible as the text decoder, a batch of one is whole, and 8 key heads on 16 devices are copied.
    """

    axes: Mapping[str, tuple[str, ...]]

    def __post_init__(self):
        for name, mesh_axes in self.axes.items():
            if unknown := set(mesh_axes) - set(MESH_AXES):
                raise ValueError(f"rule {name!r} names the mesh axis {sorted(unknown)[0]!r}; axes are {MESH_AXES}")


# Weights are shared out over every axis that splits tokens, for each of them needs all weights in turn: their "embed"
# dimension over fsdp, expert and context. A routed expert lies on the devices of its place on the expert axis.
TRAINING = Rules(
    {
        "batch": ("data", "fsdp", "expert"),
        "dense_batch": ("data", "fsdp", "expert"),
        "length": ("context",),
        "tile": ("data", "fsdp", "expert", "context"),
        "embed": ("fsdp", "expert", "context"),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "vision_mlp": ("tensor",),
        "vocab": ("tensor",),
        "expert": ("expert",),
        "expert_embed": ("fsdp", "context"),
        "expert_mlp": ("tensor",),
        "slots": ("context",),
    }
)
# Weights stay where they are, and what a token needs comes to it as partial sums. Caches are split like the batch;
# dense layers are split over the expert axis instead, so they see the rows of all its devices ("dense_batch").
SERVING = Rules(
    {
        "batch": ("data", "fsdp", "expert"),
        "dense_batch": ("data", "fsdp"),
        "length": ("context",),
        "tile": ("data", "fsdp", "expert", "context"),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor", "expert"),
        "vision_mlp": ("tensor",),
        "vocab": ("tensor", "expert"),
        "expert": ("expert",),
        "expert_mlp": ("tensor",),
        "slots": ("context",),
    }
)

_rules = contextvars.ContextVar("rules", default=TRAINING)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Traces what is inside with these rules."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def make_mesh(devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """Returns a mesh with the named axis sizes; axes that are left out have size 1.

    On several slices the data axis crosses them: only gradients go over the slow network between slices.

    Args:
        devices: to take from, the first ones; by default the machine's own.
        sizes: of the axes.

    Raises:
        ValueError: an axis has no such name, there are fewer devices than the sizes multiply to, or slices do not
            divide the data axis.
    """
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"unknown mesh axis {sorted(unknown)[0]!r}; axes are {', '.join(MESH_AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if wrong := [axis for axis, size in zip(MESH_AXES, shape, strict=True) if size < 1]:
        raise ValueError(f"the mesh axis {wrong[0]} has size {sizes[wrong[0]]}; sizes are at least 1")
    needed, found = math.prod(shape), list(jax.devices() if devices is None else devices)
    if needed > len(found):
        where = f"this machine has {len(found)} ({found[0].platform})" if devices is None else f"{len(found)} are given"
        hint = f"; for a dry run set XLA_FLAGS=--xla_force_host_platform_device_count={needed}" if not devices else ""
        raise ValueError(f"mesh {describe(sizes)} needs {needed} devices, {where}{hint}")
    axis_types = (AxisType.Auto,) * len(shape)
    num_slices = len({getattr(device, "slice_index", 0) for device in found})
    from jax.experimental import mesh_utils

    if num_slices == 1:
        laid_out = mesh_utils.create_device_mesh(shape, found[:needed], allow_split_physical_axes=True)
        return Mesh(laid_out, MESH_AXES, axis_types=axis_types)
    if shape[0] % num_slices or needed != len(found):
        raise ValueError(
            f"mesh {describe(sizes)} does not lie on {num_slices} slices of {len(found) // num_slices} devices; use "
            f"every device, and a data axis that is a multiple of {num_slices}"
        )
    inner, across = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1, 1, 1)
    laid_out = mesh_utils.create_hybrid_device_mesh(inner, across, found, allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=axis_types)


def check_mesh(config: Llama4Config, sizes: Mapping[str, int], *, rows: int | None = None, length: int | None = None):
    """Checks that a model, and a batch of `rows` of `length` tokens, can be spread over a mesh of these sizes.

    Raises:
        ValueError: one of them does not divide; the message says by what it would.
    """
    text, whole = config.text_config, {axis: sizes.get(axis, 1) for axis in MESH_AXES}

    def check(what: str, number: int, axis: str, size: int):
        if number % size:
            fitting = [str(n) for n in range(1, number + 1) if number % n == 0]
            shown = ", ".join(fitting if len(fitting) < 13 else [*fitting[:12], "..."])
            raise ValueError(f"{what}={number} is not divisible by {axis} of size {size}; choose one of {shown}")

    if text.moe_layers:
        check("num_local_experts", text.num_local_experts, "the expert axis", whole["expert"])
    # A device needs whole key heads with all their query heads: rotary pairs and the QK norm belong together.
    check("num_key_value_heads", text.num_key_value_heads, "the tensor axis", whole["tensor"])
    if config.vision_config is not None:
        check(
            "vision num_attention_heads", config.vision_config.num_attention_heads, "the tensor axis", whole["tensor"]
        )
    if rows is not None:
        check("rows", rows, "the axes data x fsdp x expert", whole["data"] * whole["fsdp"] * whole["expert"])
    if length is not None and whole["context"] > 1:
        check("row_tokens", length, "twice the context axis", 2 * whole["context"])


def describe(sizes: Mapping[str, int]) -> str:
    """Returns mesh sizes as they are typed: `fsdp=4,expert=16`."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"


def parse_sizes(text: str) -> dict[str, int]:
    """Reads `fsdp=4,expert=16`.

    Raises:
        ValueError: it is not written so, or an axis has no such name.
    """
    sizes = {}
    for word in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = word.partition("=")
        if axis not in MESH_AXES or not size.isdigit() or axis in sizes:
            raise ValueError(f"mesh {text!r}: {word!r} is not axis=size; axes are {', '.join(MESH_AXES)}, each once")
        sizes[axis] = int(size)
    return sizes


def spec(logical_axes: LogicalAxes, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns the partition of an array of `shape` whose dimensions carry `logical_axes` (None: whole).

    Args:
        sizes: of the mesh axes.

    Raises:
        ValueError: two dimensions would be split over the same mesh axis.
    """
    rules, entries = _rules.get().axes, []
    for name, dim in zip(logical_axes, shape, strict=True):
        taken: list[str] = []
        for axis in rules.get(name, ()) if name else ():
            if dim % math.prod(sizes[a] for a in [*taken, axis]):
                break
            taken.append(axis)
        # An axis of size 1 splits nothing; leaving it out lets two spellings of one layout compare equal.
        entries.append(tuple(axis for axis in taken if sizes[axis] > 1))
    used = [axis for entry in entries for axis in entry]
    if len(used) != len(set(used)):
        twice = next(axis for axis in used if used.count(axis) > 1)
        clash = [name for name, entry in zip(logical_axes, entries, strict=True) if twice in entry]
        raise ValueError(f"logical axes {' and '.join(map(repr, clash))} both map to the mesh axis {twice!r}")
    return PartitionSpec(*[entry if len(entry) > 1 else entry[0] if entry else None for entry in entries])


def axis_sizes() -> dict[str, int]:
    """Returns the sizes of the mesh that is set; all 1 without one, and 1 for axes that a `shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes) if not mesh.empty else set()
    found = dict(mesh.shape) if not mesh.empty else {}
    return {axis: 1 if axis in manual else found.get(axis, 1) for axis in MESH_AXES}


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Returns `x` with its dimensions split as the rules say, under the mesh that is set; without one, `x`."""
    sizes = axis_sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes, x.shape, sizes))


def named_sharding(mesh: Mesh, logical_axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """Returns where an array of `shape` lies on `mesh`."""
    return NamedSharding(mesh, spec(logical_axes, shape, dict(mesh.shape)))


def place(tree: Any, mesh: Mesh, logical_axes: Mapping[str, LogicalAxes]) -> Any:
    """Returns a dict of host arrays as arrays on the mesh; every process gives its own part of the first dimension.

    Args:
        tree: name -> numpy array, or None.
        logical_axes: name -> axes of its dimensions.
    """

    def put(name: str, value: np.ndarray | None) -> jax.Array | None:
        if value is None:
            return None
        whole = (value.shape[0] * jax.process_count(), *value.shape[1:])
        sharding = named_sharding(mesh, logical_axes[name], whole)
        return jax.make_array_from_process_local_data(sharding, value, whole)

    return {name: put(name, value) for name, value in tree.items()}
