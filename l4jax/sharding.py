"""The one home of mesh axes, logical axes and the rules between them.

Modules name *logical* axes only (`"embed"`, `"heads"`, `"expert"`, ...); the table here says which mesh axis carries
each. There is always a mesh: a laptop has a mesh of ones, where every constraint is free.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

# Logical axis -> mesh axes. An axis that is not listed is replicated.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "vocab": ("tensor",),
}


def make_mesh(**sizes: int) -> Mesh:
    """Returns a mesh with the named axis sizes; axes that are left out have size 1.

    Raises:
        ValueError: an axis has no such name, or the machine has fewer devices than the sizes multiply to.
    """
    if unknown := set(sizes) - set(MESH_AXES):
        raise ValueError(f"unknown mesh axis {sorted(unknown)[0]!r}; axes are {', '.join(MESH_AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed, devices = math.prod(shape), jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"mesh {dict(sizes)} needs {needed} devices, this machine has {len(devices)} ({devices[0].platform}); "
            f"for a dry run set XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices[:needed])


def spec(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the partition of an array whose dimensions carry `logical_axes` (None: replicated).

    Raises:
        ValueError: two dimensions would be split over the same mesh axis.
    """
    entries = [RULES.get(axis, ()) if axis else () for axis in logical_axes]
    used = [axis for entry in entries for axis in entry]
    if len(used) != len(set(used)):
        twice = next(axis for axis in used if used.count(axis) > 1)
        clash = [name for name, entry in zip(logical_axes, entries, strict=True) if twice in entry]
        raise ValueError(f"logical axes {' and '.join(map(repr, clash))} both map to the mesh axis {twice!r}")
    return PartitionSpec(*[entry or None for entry in entries])


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Returns `x` with its dimensions split as the rules say, under the mesh that is set; without one, `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes))


def named_sharding(mesh: Mesh, logical_axes: tuple[str | None, ...]) -> NamedSharding:
    return NamedSharding(mesh, spec(logical_axes))
